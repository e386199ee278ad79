"""Corpora: shuffled and split the same way each time, built once, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from archerchat.data import corpus
from archerchat.data.corpus import CorpusOptions, build_corpus, find_recipe
from archerchat.data.shards import Shard, iter_documents, list_shards, split_shards
from archerchat.errors import DataError, UsageError

DOCUMENTS = [f"document {i}" for i in range(400)]
SINGLES = [[text] for text in DOCUMENTS]


def build(groups: Sequence[Sequence[str]], directory: Path, **options: Any) -> bool:
    recipe = {"groups": len(groups)}
    return build_corpus(groups, directory, recipe, CorpusOptions(**options))


def read(directory: Path) -> tuple[list[str], list[str]]:
    train, validation = split_shards(list_shards(directory))
    return list(iter_documents(train)), list(iter_documents(validation))


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.iterdir()
    }


def test_every_document_is_in_one_split_and_shuffled(tmp_path: Path) -> None:
    assert build(SINGLES, tmp_path / "c", val_fraction=0.1, documents_per_shard=100)
    train, validation = read(tmp_path / "c")
    assert sorted(train + validation) == sorted(DOCUMENTS)
    assert len(validation) == 40
    assert train != sorted(train, key=DOCUMENTS.index)
    assert [path.name for path in list_shards(tmp_path / "c")] == [
        f"shard_{i:05d}.parquet" for i in range(5)
    ]


def test_both_splits_have_row_groups_for_eight_ranks(tmp_path: Path) -> None:
    build(SINGLES, tmp_path / "c", val_fraction=0.1)
    for path in list_shards(tmp_path / "c"):
        with Shard(path) as shard:
            assert shard.num_row_groups >= 8


def test_the_same_input_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    contents = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build(SINGLES, tmp_path / name, seed=seed)
        contents.append([path.read_bytes() for path in list_shards(tmp_path / name)])
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_many_buckets_shuffle_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BUCKET_BYTES", 1000)
    build_corpus(SINGLES, tmp_path / "c", {}, CorpusOptions(), input_bytes=4500)
    train, validation = read(tmp_path / "c")
    assert sorted(train + validation) == sorted(DOCUMENTS)
    numbers = [DOCUMENTS.index(text) for text in train]
    assert max(numbers[:100]) > 300
    assert min(numbers[-100:]) < 100


def test_groups_are_not_torn_apart(tmp_path: Path) -> None:
    groups = [[f"{i} source", f"{i} help", " \n"] for i in range(50)]
    build(groups, tmp_path / "c", val_documents=11)
    train, validation = read(tmp_path / "c")
    assert len(validation) == 12  # whole groups until there are 11; blank documents left out
    assert len(train) == 88
    modules = [{text.split()[0] for text in texts} for texts in (train, validation)]
    assert modules[0].isdisjoint(modules[1])


def test_named_validation_is_kept_apart(tmp_path: Path) -> None:
    held = [[f"held {i}"] for i in range(30)]
    for wanted, count in ((None, 30), (7, 7)):
        directory = tmp_path / str(count)
        options = CorpusOptions(val_documents=wanted)
        assert build_corpus(SINGLES, directory, {}, options, held_out=held)
        train, validation = read(directory)
        assert sorted(train) == sorted(DOCUMENTS)
        assert len(validation) == count
        assert all(text.startswith("held") for text in validation)
    with pytest.raises(DataError, match="at least two documents"):
        build_corpus([], tmp_path / "none", {}, CorpusOptions(), held_out=held)


def test_building_again_does_nothing_until_something_changes(tmp_path: Path) -> None:
    def never() -> Iterator[Sequence[str]]:
        raise AssertionError("read the input again")
        yield

    directory, recipe = tmp_path / "c", {"files": [["a.txt", 3]], "tuple": (1, 2)}
    assert build_corpus(SINGLES, directory, recipe, CorpusOptions())
    before = snapshot(directory)
    assert not build_corpus(never(), directory, recipe, CorpusOptions())
    assert snapshot(directory) == before
    for other, options, message in (
        (
            {**recipe, "files": [["a.txt", 4], ["b.txt", 4]]},
            CorpusOptions(),
            r"source files added \(1\): b.txt; source files changed \(1\): a.txt",
        ),
        ({**recipe, "tuple": None}, CorpusOptions(), r"tuple: \[1, 2\] saved, None now"),
        (recipe, CorpusOptions(seed=3), r"seed: 0 saved, 3 now.*--name .*--force"),
    ):
        with pytest.raises(UsageError, match=message):
            build_corpus(never(), directory, other, options)
    assert snapshot(directory) == before
    assert find_recipe(directory) == {"files": [["a.txt", 3]], "tuple": [1, 2]}
    assert build_corpus(SINGLES, directory, {"files": []}, CorpusOptions(seed=3), force=True)
    assert find_recipe(directory) == {"files": []}
    assert build_corpus(SINGLES, directory, {"files": []}, CorpusOptions(seed=3), force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    "damage",
    [
        "missing",
        "short",
        "[",
        "[1]",
        '{"format": 1}',
        '{"format": 1, "recipe": {}, "options": {}, "shards": []}',
        '{"format": 1, "recipe": {"files": 3}, "options": {}, "shards": {}}',
        '{"format": 1, "recipe": {"folder": []}, "options": {}, "shards": {}}',
    ],
)
def test_a_damaged_corpus_is_built_anew(tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "c"
    build(SINGLES, directory)
    shard = list_shards(directory)[0]
    good = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "short":
        shard.write_bytes(good[:50])
    else:
        (directory / corpus.MANIFEST).write_text(damage)
        assert find_recipe(directory) is None
    assert build(SINGLES, directory)
    assert shard.read_bytes() == good
    assert json.loads((directory / corpus.MANIFEST).read_text())["options"]["seed"] == 0


def test_a_damaged_corpus_of_another_recipe_is_not_replaced(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    build(SINGLES, directory)
    list_shards(directory)[0].unlink()
    assert find_recipe(directory) is None
    with pytest.raises(UsageError, match="seed: 0 saved, 1 now"):
        build(SINGLES, directory, seed=1)


def test_data_from_elsewhere_is_not_replaced(tmp_path: Path) -> None:
    directory = tmp_path / "climbmix"
    directory.mkdir()
    (directory / "shard_00000.parquet").write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"climbmix holds data that was not built here"):
        build(SINGLES, directory)
    with pytest.raises(UsageError, match="not built here"):
        build_corpus(SINGLES, directory, {}, CorpusOptions(), force=True)
    assert (directory / "shard_00000.parquet").read_bytes() == b"precious"


@pytest.mark.parametrize("groups", [[], [["one"]], [["one", "two"]], [["one"], [""], ["\n"]]])
def test_too_little_to_split_is_refused(tmp_path: Path, groups: list[list[str]]) -> None:
    with pytest.raises(DataError, match=r"at least two documents are needed, .*: give more text"):
        build(groups, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_two_documents_are_enough(tmp_path: Path) -> None:
    build([["one"], ["two"]], tmp_path / "c", val_documents=100)
    train, validation = read(tmp_path / "c")
    assert (len(train), len(validation)) == (1, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"val_fraction": 0.0},
        {"val_fraction": 1.0},
        {"val_documents": 0},
        {"documents_per_shard": 0},
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} is"):
        CorpusOptions(**options)


def test_the_temporary_files_are_compressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill, written = corpus._spill, list[int]()

    def measure(groups: Any, held_out: Any, buckets: list[Path], generator: Any) -> Any:
        found = spill(groups, held_out, buckets, generator)
        written.extend(path.stat().st_size for path in buckets)
        return found

    monkeypatch.setattr(corpus, "_spill", measure)
    build([["word " * 10_000]] * 10, tmp_path / "c")
    assert 0 < sum(written) < 100_000


def test_every_character_comes_through(tmp_path: Path) -> None:
    texts = ["a\rb\r\nc\n", "\u2028\x85\x0b\x00", '"quoted" \\n', "ünïcode 🐍"]
    build([[text] for text in texts], tmp_path / "c")
    train, validation = read(tmp_path / "c")
    assert sorted(train + validation) == sorted(texts)


def test_lone_surrogates_become_replacement_characters(tmp_path: Path) -> None:
    build([["a\ud800b"], ["a\ud800b"]], tmp_path / "c")
    assert read(tmp_path / "c") == (["a�b"], ["a�b"])


def test_a_full_disk_leaves_the_old_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "c"
    build(SINGLES, directory)
    before = snapshot(directory)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("archerchat.files.os.fsync", full)
    with pytest.raises(DataError, match=r"No space left on device\): free some space"):
        build_corpus(SINGLES, directory, {}, CorpusOptions(seed=5), force=True)
    assert snapshot(directory) == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_build_leaves_nothing_that_looks_built(tmp_path: Path, how: int) -> None:
    directory = tmp_path / "data" / "c"
    program = (
        "import time\n"
        "from pathlib import Path\n"
        "from archerchat.data.corpus import CorpusOptions, build_corpus\n"
        "def groups():\n"
        "    for i in range(5000): yield [f'document {i}']\n"
        "    print('spilled', flush=True)\n"
        "    time.sleep(20)\n"
        f"build_corpus(groups(), Path({str(directory)!r}), {{}}, CorpusOptions())\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"spilled\n"
    time.sleep(0.05)
    child.send_signal(how)
    child.wait(10)
    child.stdout.close()
    assert not directory.exists()
    assert build(SINGLES, directory)
    assert [path.name for path in directory.parent.iterdir()] == ["c"]
