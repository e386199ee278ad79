"""Rows from Parquet and JSON lines, and what broken files are told."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from archerchat.errors import DataError
from archerchat.tasks.tables import iter_json_lines, read_rows


def test_parquet_rows_run_over_files_and_row_groups(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.parquet" for name in "ab"]
    for path, start in zip(paths, (0, 10), strict=True):
        numbers = list(range(start, start + 10))
        nested = [{"text": [str(n)]} for n in numbers]
        pq.write_table(pa.table({"n": numbers, "x": nested, "y": numbers}), path, row_group_size=3)
    rows = read_rows(paths, ["n", "x"])
    assert len(rows) == 20
    assert [row["n"] for row in rows] == list(range(20))
    assert rows[13] == {"n": 13, "x": {"text": ["13"]}}
    assert [row["n"] for row in rows[18:]] == [18, 19]
    with pytest.raises(IndexError):
        rows[20]


def test_parquet_of_another_data_set_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1]}), path)
    with pytest.raises(DataError, match=r"no column 'question' and no 'answer' \(it has n\)"):
        read_rows([path], ["question", "n", "answer"])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cannot read .*a.parquet as Parquet"):
        read_rows([path], ["n"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_plain_or_gzipped(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    content = b'{"n": 1}\n\n  \n{"n": 2, "more": 3}'
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(read_rows([path, path], ["n"])) == [{"n": 1}, {"n": 2, "more": 3}] * 2
    assert [where for where, _ in iter_json_lines(path)] == [f"{path}:1", f"{path}:4"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"n": ', r"a.jsonl:3: not JSON \(.*mend or remove that line"),
        (b"\xff\xfe", r"a.jsonl:3: not JSON"),
        (b"[" * 100_000, r"a.jsonl:3: not JSON"),
        (b'{"m": 1}', r"a.jsonl:3: the line has no 'n': each must be an object with n"),
        (b"[1]", r"a.jsonl:3: the line has no 'n'"),
    ],
)
def test_a_broken_line_is_named_by_number(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n\n' + line + b'\n{"n": 4}\n')
    with pytest.raises(DataError, match=message):
        read_rows([path], ["n"])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none.jsonl \(No such file"):
        read_rows([tmp_path / "none.jsonl"], [])
    packed = tmp_path / "a.jsonl.gz"
    for content in (b"plain text", gzip.compress(b'{"n": 1}\n' * 999)[:-12], b"\x1f\x8b\x08\x00"):
        packed.write_bytes(content)
        with pytest.raises(DataError, match="check that the file is whole"):
            read_rows([packed], [])
