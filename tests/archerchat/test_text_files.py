"""Folders, encodings and rows, as people have them."""

from __future__ import annotations

import bz2
import lzma
from pathlib import Path

import pytest

from archerchat.errors import DataError
from archerchat.text_files import iter_lines, iter_rows, list_folder


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(root: Path, paths: list[Path]) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


@pytest.mark.parametrize(
    ("files", "train", "held_out"),
    [
        (["train.txt", "valid.txt"], ["train.txt"], ["valid.txt"]),
        (["data/train-0-of-1.txt", "data/test-0-of-1.txt"], ["data/train-0-of-1.txt"], None),
        (["train/a.txt", "val/a.txt", "b.txt"], ["b.txt", "train/a.txt"], ["val/a.txt"]),
        (["x_train.txt.gz", "x_dev.txt", "x_test.txt"], ["x_train.txt.gz"], ["x_dev.txt"]),
        (["test.txt", "dev/a.txt"], ["dev/a.txt", "test.txt"], []),  # nothing is named train
        (["how-to-train-a-dog.txt", "test.txt"], ["how-to-train-a-dog.txt", "test.txt"], []),
    ],
)
def test_splits_that_names_tell_are_kept(
    tmp_path: Path, files: list[str], train: list[str], held_out: list[str] | None
) -> None:
    make(tmp_path, *files)
    folder = list_folder(tmp_path, (".txt",))
    assert names(tmp_path, folder.train) == train
    assert names(tmp_path, folder.held_out) == (files[1:] if held_out is None else held_out)
    assert folder.left_out == (["x_test.txt (the test split)"] if "x_test.txt" in files else [])


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "README.md", "dataset_info.json", "1.png", "2.png", "LICENSE", ".x")
    folder = list_folder(tmp_path, (".jsonl", ".json", ".md"))
    assert names(tmp_path, folder.train) == ["a.jsonl"]
    assert folder.left_out == [
        "2 files (.png, which is not read), such as 1.png",
        "LICENSE (no suffix, which is not read)",
        "2 files (the data set's description), such as README.md",
    ]
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "dataset_info.json").unlink()
    assert names(tmp_path, list_folder(tmp_path, (".md",)).train) == ["README.md"]  # notes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_names_the_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"ü": 1}\r\n{"€": 2}'.encode(encoding))
    assert list(iter_rows(path)) == [(f"{path}:1", {"ü": 1}), (f"{path}:2", {"€": 2})]


@pytest.mark.parametrize(("suffix", "compress"), [(".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_text_is_read_and_must_be_whole(tmp_path: Path, suffix: str, compress) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(b"one\ntwo"))
    assert [line for _, line in iter_lines(path)] == ["one\n", "two"]
    path.write_bytes(compress(b"one\ntwo" * 999)[:-9])
    with pytest.raises(DataError, match=r"cannot read .*check that the file is whole"):
        list(iter_lines(path))


def test_text_in_no_known_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for content in (b"ok\ncaf\xe9\n", "ok\n".encode("utf-16") + b"\x00\xd8"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a.txt:\d: not .*text.*: convert the file to UTF-8"):
            list(iter_lines(path))
