"""Folders of Parquet, JSONL and text become documents, or an error that names the file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from archerchat.data.folder import Reading, describe_files, list_files, split_text
from archerchat.data.shards import write_shards
from archerchat.errors import DataError, UsageError


def read(source: Path, **options: Any) -> list[str]:
    return list(Reading(**options).iter_texts(list_files(source).train))


def test_every_kind_of_file_is_read_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "from jsonl", "id": 3}\n\n"bare"\n')
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.MD").write_text("# notes", encoding="utf-8-sig")
    (tmp_path / "d.txt").write_text("plain ünïcode", encoding="utf-8")
    (tmp_path / "e.csv").write_text('id,text\n1,"from\n""csv"""\n2,more\n')
    (tmp_path / "f.tsv").write_text("text\tid\nfrom tsv\t1\n")
    (tmp_path / "g.json").write_text('[{"text": "from json"},\n"and bare"]')
    (tmp_path / "h.json").write_text('{"text": "lines"}\n{"text": "in json"}\n')
    (tmp_path / "i.jsonl.gz").write_bytes(gzip.compress(b'{"text": "from gzip"}\n'))
    with pa.output_stream(tmp_path / "j.txt.zst", compression="zstd") as file:
        file.write("from zstd".encode("utf-16"))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "f.txt").write_text("not read")
    write_shards(["from parquet"], tmp_path / "a")
    assert read(tmp_path) == [
        *("from parquet", "from jsonl", "bare", "# notes", "plain ünïcode", 'from\n"csv"', "more"),
        *("from tsv", "from json", "and bare", "lines", "in json", "from gzip", "from zstd"),
    ]
    assert read(tmp_path / "d.txt") == ["plain ünïcode"]
    assert read(tmp_path / ".hidden" / "f.txt") == ["not read"]


def test_another_column_holds_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n')
    (tmp_path / "b.csv").write_text("content\ntwo\n")
    pq.write_table(pa.table({"content": ["three"]}), tmp_path / "c.parquet")
    assert read(tmp_path, column="content") == ["one", "two", "three"]


def test_null_and_blank_texts_are_left_out_and_counted_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": " "}\n')
    (tmp_path / "b.csv").write_text("id,text\n1,b\n2\n3,\n")
    pq.write_table(pa.table({"text": ["c", None, ""]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("\n\n")
    reading = Reading()
    assert list(reading.iter_texts(list_files(tmp_path).train)) == ["a", "b", "c"]
    assert reading.describe() == [
        f"7 null or blank texts were left out, the first: {tmp_path}/a.jsonl:2"
    ]


def test_bad_files_and_rows_are_left_out_and_listed_on_demand(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": \n{"text": "\xff"}\n{"text": 5}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    (tmp_path / "d.txt").write_text("d")
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON .*--skip-bad leaves out"):
        read(tmp_path)
    reading = Reading(skip_bad=True)
    assert list(reading.iter_texts(list_files(tmp_path).train)) == ["a", "d"]
    count, *listed = reading.describe()
    assert count == "5 bad files or rows were left out:"
    for line, start in zip(
        listed,
        ("a.jsonl:2: n", "a.jsonl:3: n", "a.jsonl:4: n", "b.jsonl.gz", "c.parq"),
        strict=True,
    ):
        assert f"{tmp_path}/{start}" in line


def test_cut_texts_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 25_000)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "y" * 25_000}))
    reading = Reading()
    lengths = [len(text) for text in reading.iter_texts(list_files(tmp_path).train)]
    assert lengths == [10_000, 10_000, 5_000, 25_000]
    assert reading.describe() == [
        "1 texts of more than 10,000 characters were cut at paragraphs into 3 documents"
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"b\.jsonl:3: not JSON .*fix or remove that line"),
        (b'{"text": "\xff"}', r"b\.jsonl:3: not UTF-8 text"),
        (
            b'{"content": "other"}',
            r"b\.jsonl:3: no text in 'text' \(it has content\).*--text-c",
        ),
        (
            b'{"messages": []}',
            r"b\.jsonl:3: no text .*: train on conversations with `archerchat sft --jsonl FILE`",
        ),
        (b'{"conversations": []}', "archerchat sft --jsonl FILE"),
        (b'{"text": 5}', r"b\.jsonl:3: no text in 'text'"),
        (b'["text"]', r"b\.jsonl:3: no text in 'text'"),
        (b"5", r"b\.jsonl:3: no text in 'text'"),
        (b"[" * 100_000, r"b\.jsonl:3: not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt:1: not UTF-8 text: convert the file"):
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
    with pytest.raises(UsageError if make == "nothing" else DataError, match=problem) as caught:
        list_files(source)
    assert ".parquet, .jsonl, .ndjson, .json, .csv, .tsv, .txt, .md files" in str(caught.value)


def test_the_description_changes_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    first = describe_files(tmp_path, list_files(tmp_path).train)
    assert describe_files(tmp_path, list_files(tmp_path).train) == first
    (tmp_path / "a.txt").write_text("three")
    assert describe_files(tmp_path, list_files(tmp_path).train) != first


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
