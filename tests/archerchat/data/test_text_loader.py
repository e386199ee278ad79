"""The loader: resumes exactly, shares shards among ranks, and fails with a reason."""

from __future__ import annotations

import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from archerchat.checkpoint import load_checkpoint, save_checkpoint
from archerchat.data.packing import Packing
from archerchat.data.shards import iter_documents, write_shards
from archerchat.data.text_loader import Position, TextLoader
from archerchat.errors import CheckpointError, DataError
from archerchat.tokenizer.bpe import Tokenizer

SETTINGS: dict[str, Any] = {
    "batch_size": 3,
    "sequence_length": 20,
    "buffer_size": 10,
    "tokenizer_batch": 3,
}


def take(loader: TextLoader, count: int) -> list[tuple[Any, Any, Position]]:
    return [
        (batch.inputs.tolist(), batch.targets.tolist(), position_of(loader))
        for batch in islice(loader, count)
    ]


def position_of(loader: TextLoader) -> Position:
    """Where the loader was after the last batch that it returned."""
    return Position(**loader.state_dict()["position"])


State = dict[str, Any]


def through_disk(state: State, directory: Path) -> State:
    """Save and load a state as checkpoints do."""
    path = save_checkpoint(directory / "saved", 0, {"loader": state}, {})
    return load_checkpoint(path).state["loader"]


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(
        value.tolist() == right[name].tolist()
        if isinstance(value, Tensor)
        else value == right[name]
        for name, value in left.items()
    )


def test_batches_are_rows_shifted_by_one(corpus: list[Path], byte_tokenizer: Tokenizer) -> None:
    with TextLoader(corpus, byte_tokenizer, **SETTINGS) as loader:
        batch = next(loader)
    assert batch.inputs.shape == batch.targets.shape == (3, 20)
    assert batch.inputs.dtype == batch.targets.dtype == np.int64
    assert batch.inputs.flags.c_contiguous
    assert batch.targets.flags.c_contiguous
    assert (batch.inputs[:, 1:] == batch.targets[:, :-1]).all()
    assert (batch.inputs[:, 0] == byte_tokenizer.bos_id).all()


@pytest.mark.parametrize("packing", ["best-fit", "concat"])
@pytest.mark.parametrize("stop", [0, 1, 2, 7, 33, 90])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_resume_yields_what_an_uninterrupted_run_does(
    packing: Packing,
    stop: int,
    rank: int,
    world_size: int,
    corpus: list[Path],
    byte_tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    settings = SETTINGS | {"packing": packing, "rank": rank, "world_size": world_size}
    with TextLoader(corpus, byte_tokenizer, **settings) as loader:
        take(loader, stop)
        state = through_disk(loader.state_dict(), tmp_path)
        expected = take(loader, 60)
    if stop == 33:
        assert state["position"]["epoch"] < expected[-1][2].epoch, "this case must cross an epoch"
    with TextLoader(corpus, byte_tokenizer, prefetch=1, **settings) as resumed:
        resumed.load_state_dict(state)
        assert take(resumed, 60) == expected


def test_state_is_of_the_last_batch_returned_not_of_the_last_made(
    corpus: list[Path], byte_tokenizer: Tokenizer
) -> None:
    with TextLoader(corpus, byte_tokenizer, prefetch=50, **SETTINGS) as far_ahead:
        take(far_ahead, 5)
        state = far_ahead.state_dict()
    with TextLoader(corpus, byte_tokenizer, prefetch=1, **SETTINGS) as barely_ahead:
        take(barely_ahead, 5)
        expected = barely_ahead.state_dict()
    assert same(state, expected)


def test_a_loader_can_go_back_and_go_on_after_close(
    corpus: list[Path], byte_tokenizer: Tokenizer
) -> None:
    with TextLoader(corpus, byte_tokenizer, **SETTINGS) as loader:
        take(loader, 4)
        state = loader.state_dict()
        expected = take(loader, 6)
        loader.load_state_dict(state)
        assert take(loader, 3) == expected[:3]
        loader.close()
        assert take(loader, 3) == expected[3:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 21}, "sequence_length: 20 saved, 21 now"),
        ({"packing": "concat"}, "packing: 'best-fit' saved, 'concat' now"),
        ({"world_size": 2}, "world_size: 1 saved, 2 now"),
        ({"buffer_size": 11}, "buffer_size: 10 saved, 11 now"),
    ],
)
def test_a_changed_setting_is_refused_at_restore(
    change: dict[str, Any], message: str, corpus: list[Path], byte_tokenizer: Tokenizer
) -> None:
    state = TextLoader(corpus, byte_tokenizer, **SETTINGS).state_dict()
    loader = TextLoader(corpus, byte_tokenizer, **SETTINGS | change)
    with pytest.raises(CheckpointError, match=f"cannot resume: {message}"):
        loader.load_state_dict(state)


def test_other_shards_or_another_tokenizer_are_refused_at_restore(
    corpus: list[Path], byte_tokenizer: Tokenizer
) -> None:
    state = TextLoader(corpus, byte_tokenizer, **SETTINGS).state_dict()
    for extend in (False, True):
        fewer = TextLoader(corpus[:2], byte_tokenizer, extend=extend, **SETTINGS)
        difference = r"shards: 3 entries saved, 2 now; 1 differ, the first: \['shard_00002"
        with pytest.raises(CheckpointError, match=difference):
            fewer.load_state_dict(state)
    ranks = {bytes([value]): 255 - value for value in range(256)}
    other = TextLoader(corpus, Tokenizer(ranks), **SETTINGS)
    with pytest.raises(CheckpointError, match=r"tokenizer: '\w+\.*' saved, '\w+\.*' now"):
        other.load_state_dict(state)


@pytest.mark.parametrize("stop", [0, 12, 33, 90])
@pytest.mark.parametrize("added", ["shard_00003.parquet", "shard_00000a.parquet"])
def test_shards_that_came_meanwhile_change_nothing(
    stop: int, added: str, corpus: list[Path], byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with TextLoader(corpus, byte_tokenizer, **SETTINGS) as loader:
        take(loader, stop)
        state = through_disk(loader.state_dict(), tmp_path)
        expected = take(loader, 60)
    (new,) = write_shards(["new text"] * 40, tmp_path)
    more = sorted([*corpus, new.rename(tmp_path / added)], key=lambda path: path.name)
    with TextLoader(more, byte_tokenizer, **SETTINGS) as resumed:
        resumed.load_state_dict(state)
        assert take(resumed, 60) == expected
        assert resumed.state_dict()["identity"] == state["identity"]


def test_an_extended_run_goes_on_into_the_shards_that_came_meanwhile(
    corpus: list[Path], byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with TextLoader(corpus, byte_tokenizer, **SETTINGS) as uninterrupted:
        expected = take(uninterrupted, 60)
    with TextLoader(corpus[:2], byte_tokenizer, **SETTINGS) as loader:
        stop = sum(position.shard < 2 and position.epoch == 1 for *_, position in expected) - 2
        assert take(loader, stop) == expected[:stop]
        state = through_disk(loader.state_dict(), tmp_path)
    with TextLoader(corpus, byte_tokenizer, extend=True, **SETTINGS) as extended:
        extended.load_state_dict(state)
        rest = take(extended, 60 - stop)
        assert rest == expected[stop:]
        assert {position.shard for *_, position in rest} == {0, 1, 2}
        later = through_disk(extended.state_dict(), tmp_path)
    with TextLoader(corpus, byte_tokenizer, **SETTINGS) as resumed:  # plainly, from now on
        resumed.load_state_dict(later)
        assert resumed.state_dict()["identity"] == later["identity"]


def test_an_extended_run_refuses_shards_before_the_saved_ones(
    corpus: list[Path], byte_tokenizer: Tokenizer
) -> None:
    state = TextLoader(corpus[1:], byte_tokenizer, **SETTINGS).state_dict()
    loader = TextLoader(corpus, byte_tokenizer, extend=True, **SETTINGS)
    with pytest.raises(
        CheckpointError, match="shards: 2 entries saved, 3 now; 3 differ, the first"
    ):
        loader.load_state_dict(state)


@pytest.mark.parametrize("packing", ["best-fit", "concat"])
def test_an_extended_run_may_have_another_batch_size(
    packing: Packing, corpus: list[Path], byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    settings = SETTINGS | {"packing": packing}
    with TextLoader(corpus, byte_tokenizer, **settings) as loader:
        take(loader, 5)
        state = through_disk(loader.state_dict(), tmp_path)
        expected = [row for inputs, *_ in take(loader, 20) for row in inputs]
    settings |= {"batch_size": 5, "extend": True}
    with TextLoader(corpus, byte_tokenizer, **settings) as extended:
        extended.load_state_dict(state)
        assert extended.state_dict()["identity"]["batch_size"] == 5
        assert [row for inputs, *_ in take(extended, 12) for row in inputs] == expected


def test_a_restore_after_a_restore_chooses_from_all_shards(
    corpus: list[Path], byte_tokenizer: Tokenizer
) -> None:
    narrow = TextLoader(corpus[:2], byte_tokenizer, **SETTINGS).state_dict()
    with TextLoader(corpus, byte_tokenizer, **SETTINGS) as loader:
        whole = loader.state_dict()
        expected = take(loader, 60)
        loader.load_state_dict(narrow)
        assert take(loader, 60) != expected
        loader.load_state_dict(whole)
        assert take(loader, 60) == expected


def test_a_state_has_the_names_and_types_that_checkpoints_have(
    corpus: list[Path], byte_tokenizer: Tokenizer
) -> None:
    with TextLoader(corpus[:1], byte_tokenizer, **SETTINGS) as loader:
        fresh = loader.state_dict()
        take(loader, 2)
        state = loader.state_dict()
    for each in (fresh, state):
        assert (each["tokens"].dtype, each["lengths"].dtype) == (torch.uint16, torch.int64)
    assert state["tokens"].numel() == state["lengths"].clamp(max=21).sum() > 0
    assert {name: value for name, value in fresh.items() if name not in ("tokens", "lengths")} == {
        "identity": {
            **SETTINGS,
            "packing": "best-fit",
            "rank": 0,
            "world_size": 1,
            "tokenizer": byte_tokenizer.fingerprint,
            "shards": [["shard_00000.parquet", corpus[0].stat().st_size]],
        },
        "position": {"shard": 0, "row_group": 0, "epoch": 1},
        "next_document": 0,
        "usage": {"epochs": 0.0, "used": 0, "dropped": 0},
    }


def test_a_broken_state_is_refused(corpus: list[Path], byte_tokenizer: Tokenizer) -> None:
    with TextLoader(corpus, byte_tokenizer, **SETTINGS) as loader:
        take(loader, 2)
        state = loader.state_dict()
        for broken in (
            {**state, "position": {"shard": 0}},
            {"identity": state["identity"]},
            {name: value for name, value in state.items() if name != "lengths"},
            {**state, "tokens": state["tokens"][:-1]},
            {**state, "lengths": torch.tensor([len(state["tokens"]), 0])},
            {**state, "usage": {"epoch": 1}},
        ):
            with pytest.raises(CheckpointError, match=r"data loader is broken .*earlier checkpo"):
                loader.load_state_dict(broken)
        assert same(loader.state_dict(), state)


def test_differences_among_thousands_of_shards_are_one_line(
    corpus: list[Path], byte_tokenizer: Tokenizer
) -> None:
    loader = TextLoader(corpus, byte_tokenizer, **SETTINGS)
    state = loader.state_dict()
    state["identity"]["shards"] = [[f"old_{i:05d}.parquet", i] for i in range(5000)]
    with pytest.raises(CheckpointError) as caught:
        loader.load_state_dict(state)
    message = str(caught.value)
    assert "shards: 5000 entries saved, 3 now; 5000 differ, the first: ['old_00000.pa" in message
    assert "now. Restore the old settings or data, or start a new run" in message
    assert len(message) < 300


def test_ranks_share_every_document_once(corpus: list[Path], byte_tokenizer: Tokenizer) -> None:
    # With rows of two tokens, BOS and one more, the targets spell the documents out.
    settings: dict[str, Any] = {"packing": "concat", "batch_size": 1, "sequence_length": 1}
    seen = ""
    for rank in range(3):
        with TextLoader(corpus, byte_tokenizer, rank=rank, world_size=3, **settings) as loader:
            for batch in loader:
                if position_of(loader).epoch > 1:
                    break
                token = int(batch.targets[0, 0])
                seen += chr(token) if token != byte_tokenizer.bos_id else ""
    assert sorted(seen) == sorted("".join(iter_documents(corpus)))


@pytest.mark.parametrize("packing", ["best-fit", "concat"])
def test_empty_and_long_documents_are_packed(
    packing: Packing, tmp_path: Path, byte_tokenizer: Tokenizer
) -> None:
    shards = write_shards(["", "a" * 30, "b"], tmp_path)
    settings = SETTINGS | {"packing": packing, "buffer_size": 1, "batch_size": 1}
    with TextLoader(shards, byte_tokenizer, **settings) as loader:
        rows = [[*batch.inputs[0], batch.targets[0, -1]] for batch in islice(loader, 2)]
    bos, a, b = byte_tokenizer.bos_id, ord("a"), ord("b")
    empty, long, short = [bos], [bos] + [a] * 30, [bos, b]
    if packing == "best-fit":  # the long one is cropped whenever only it is left
        assert rows[0] == short + empty + long[:18]
        assert rows[1] == short + empty + long[:18]
    else:
        assert rows[0] == empty + long[:20]
        assert rows[1] == [bos, *long[20:], *short, *empty, *long[:6]]


@pytest.mark.parametrize("packing", ["best-fit", "concat"])
def test_the_state_does_not_grow_with_the_documents(
    packing: Packing, tmp_path: Path, byte_tokenizer: Tokenizer
) -> None:
    shards = write_shards(["x" * 50_000] * 20, tmp_path)
    settings = SETTINGS | {"packing": packing, "buffer_size": 40}
    with TextLoader(shards, byte_tokenizer, **settings) as loader:
        next(loader)
        state = loader.state_dict()
    most = len(state["lengths"]) * 21 if packing == "best-fit" else 50_001
    assert len(state["tokens"]) <= most


def test_a_state_of_whole_documents_is_continued(
    corpus: list[Path], byte_tokenizer: Tokenizer
) -> None:
    """Older checkpoints hold whole documents, read ahead of `concat` too, and no usage."""
    with TextLoader(corpus, byte_tokenizer, packing="concat", **SETTINGS) as loader:
        expected = [row for inputs, *_ in take(loader, 9) for row in inputs]
        state = TextLoader(corpus, byte_tokenizer, packing="concat", **SETTINGS).state_dict()
    texts = list(islice(iter_documents(corpus), 3))
    ids = [np.array(each, np.uint16) for each in byte_tokenizer.encode_batch(texts)]
    del state["usage"]
    state |= {
        "tokens": torch.from_numpy(np.concatenate(ids)),
        "lengths": torch.tensor([len(each) for each in ids]),
        "next_document": 3,
    }
    with TextLoader(corpus, byte_tokenizer, packing="concat", **SETTINGS) as resumed:
        resumed.load_state_dict(state)
        assert [row for inputs, *_ in take(resumed, 9) for row in inputs] == expected


def test_usage_counts_passes_and_the_share_of_the_text(
    corpus: list[Path], byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokens = sum(len(text.encode()) + 1 for text in iter_documents(corpus))
    with TextLoader(corpus, byte_tokenizer, packing="concat", **SETTINGS) as loader:
        assert (loader.usage.epochs, loader.usage.text_share) == (0, 0)
        half = islice(loader, tokens // 2 // 63)
        assert len(list(half)) > 20
        assert loader.usage.epochs == pytest.approx(0.5, abs=0.05)
        assert loader.usage.text_share == pytest.approx(0.5, abs=0.05)
        list(islice(loader, 100))
        assert loader.usage.epochs > 1
        assert loader.usage.text_share == 1

    long = write_shards(["x" * 200, "y" * 200], tmp_path, documents_per_row_group=1)
    settings = SETTINGS | {"buffer_size": 4, "batch_size": 1, "tokenizer_batch": 1}
    with TextLoader(long, byte_tokenizer, **settings) as loader:
        list(islice(loader, 10))
        # Each row is the beginning of one document; three others wait.
        assert loader.usage.epochs == 5
        assert loader.usage.text_share == pytest.approx(21 / 201)


def test_a_corpus_of_empty_documents_is_all_bos(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    with TextLoader(write_shards([""], tmp_path), byte_tokenizer, **SETTINGS) as loader:
        assert (next(loader).inputs == byte_tokenizer.bos_id).all()


def test_more_ranks_than_row_groups_is_refused(
    corpus: list[Path], byte_tokenizer: Tokenizer
) -> None:
    with pytest.raises(DataError, match=r"9 ranks cannot share .* more than 8 row groups"):
        TextLoader(corpus, byte_tokenizer, rank=0, world_size=9, **SETTINGS)


def test_shards_without_documents_are_refused_not_read_for_ever(
    tmp_path: Path, byte_tokenizer: Tokenizer
) -> None:
    path = tmp_path / "shard_00000.parquet"
    nothing = pa.table({"text": pa.array([], pa.string())})
    pq.ParquetWriter(path, nothing.schema).close()
    with pytest.raises(DataError, match=r"no documents in .*download"):
        TextLoader([path], byte_tokenizer, **SETTINGS)
    pq.write_table(nothing, path)  # a row group, but an empty one
    assert pq.ParquetFile(path).num_row_groups == 1
    with (
        pytest.raises(DataError, match=r"rank 0 of 1 finds no document"),
        TextLoader([path], byte_tokenizer, **SETTINGS) as loader,
    ):
        next(loader)


def test_a_shard_that_breaks_later_surfaces_in_next(
    corpus: list[Path], byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shards = write_shards(iter_documents(corpus), tmp_path, documents_per_shard=60)
    with TextLoader(shards, byte_tokenizer, prefetch=1, **SETTINGS) as loader:
        shards[2].write_bytes(shards[2].read_bytes()[:100])
        with pytest.raises(DataError, match=r"shard_00002\.parquet as Parquet"):
            take(loader, 100)


@pytest.mark.parametrize(
    "change", [{"batch_size": 0}, {"sequence_length": 0}, {"rank": 2, "world_size": 2}]
)
def test_impossible_settings_are_refused(
    change: dict[str, int], corpus: list[Path], byte_tokenizer: Tokenizer
) -> None:
    with pytest.raises(AssertionError):
        TextLoader(corpus, byte_tokenizer, **SETTINGS | change)


def test_missing_shards_are_refused(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    (here,) = write_shards(["a"], tmp_path)
    for shards in ([tmp_path / "gone.parquet"], [here, tmp_path / "gone.parquet"]):
        with pytest.raises(DataError, match=r"cannot read .*gone\.parquet"):
            TextLoader(shards, byte_tokenizer, **SETTINGS)


def test_a_forgotten_loader_takes_its_thread_along(
    corpus: list[Path], byte_tokenizer: Tokenizer
) -> None:
    loader = TextLoader(corpus, byte_tokenizer, **SETTINGS)
    next(loader)
    threads = [each for each in threading.enumerate() if each.name.startswith("prefetch")]
    assert threads
    del loader
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.slow
def test_a_process_that_leaves_a_loader_open_exits_cleanly(corpus: list[Path]) -> None:
    program = (
        "from pathlib import Path\n"
        "from archerchat.data.text_loader import TextLoader\n"
        "from archerchat.tokenizer.bpe import Tokenizer\n"
        "tokenizer = Tokenizer({bytes([v]): v for v in range(256)})\n"
        f"loader = TextLoader([Path({str(corpus[0])!r})], tokenizer, batch_size=2,\n"
        "    sequence_length=16, prefetch=50)\n"
        "print(next(loader).inputs.shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "(2, 16)\n", "")
