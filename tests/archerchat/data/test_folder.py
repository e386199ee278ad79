"""Folders of Parquet, JSONL and text become documents, or an error that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archerchat.data.folder import describe_files, iter_files, list_files, split_text
from archerchat.data.shards import write_shards
from archerchat.errors import DataError


def read(source: Path) -> list[str]:
    return list(iter_files(list_files(source)))


def test_every_kind_of_file_is_read_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "from jsonl", "id": 3}\n\n{"text": "", "x": 1}\n')
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.MD").write_text("# notes", encoding="utf-8-sig")
    (tmp_path / "d.txt").write_text("plain ünïcode", encoding="utf-8")
    (tmp_path / "e.csv").write_text("not read")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "f.txt").write_text("not read")
    write_shards(["from parquet"], tmp_path / "a")
    assert read(tmp_path) == ["from parquet", "from jsonl", "", "# notes", "plain ünïcode"]
    assert read(tmp_path / "d.txt") == ["plain ünïcode"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"b\.jsonl:3: not JSON .*fix that line"),
        (b'{"text": "\xff"}', r"b\.jsonl:3: not JSON"),
        (b'{"content": "other"}', r"b\.jsonl:3: each line must be an object with a string 'text'"),
        (b'{"text": 5}', r"b\.jsonl:3: each line"),
        (b'["text"]', r"b\.jsonl:3: each line"),
        (b'"text"', r"b\.jsonl:3: each line"),
        (b"5", r"b\.jsonl:3: each line"),
        (b"[" * 100_000, r"b\.jsonl:3: not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 .*convert or remove it"):
        read(tmp_path)


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"x\.parquet as Parquet"):
        read(tmp_path)


@pytest.mark.parametrize("make", ["nothing", "empty", "unusable"])
def test_a_folder_with_nothing_usable_is_named(tmp_path: Path, make: str) -> None:
    source = tmp_path / "source"
    if make != "nothing":
        source.mkdir()
    if make == "unusable":
        (source / "picture.png").write_bytes(b"png")
    problem = "does not exist" if make == "nothing" else "nothing to read in"
    with pytest.raises(DataError, match=problem) as caught:
        list_files(source)
    assert ".parquet, .jsonl, .txt, .md files" in str(caught.value)


def test_the_description_changes_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    first = describe_files(tmp_path, list_files(tmp_path))
    assert describe_files(tmp_path, list_files(tmp_path)) == first
    (tmp_path / "a.txt").write_text("three")
    assert describe_files(tmp_path, list_files(tmp_path)) != first


@given(text=st.text(alphabet="ab\n", max_size=300), limit=st.integers(1, 40))
def test_pieces_are_short_enough_and_lose_nothing(text: str, limit: int) -> None:
    pieces = list(split_text(text, limit))
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)
    assert all(pieces) or not text


def test_a_cut_falls_at_the_widest_break_of_the_second_half() -> None:
    assert list(split_text("aaaa\n\n\nbb\n\ncc\ndd", 14)) == ["aaaa\n\n\nbb\n\n", "cc\ndd"]
    assert list(split_text("aaaa\n\n\nbb\n\ncc\ndd", 12)) == ["aaaa\n\n\nbb\n\n", "cc\ndd"]
    assert list(split_text("aaaaaaaa\n\n\nbb\n\ncc", 14)) == ["aaaaaaaa\n\n\n", "bb\n\ncc"]
    assert list(split_text("aaaaaaaaaa", 4)) == ["aaaa", "aaaa", "aa"]
