"""Where tasks find their files, what rows these have, and what broken files are told."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from archerchat.downloads import Check
from archerchat.errors import DataError, UsageError
from archerchat.tasks import hub
from archerchat.tasks.hub import (
    Table,
    TaskFiles,
    load_tables,
    read_rows,
)

TABLES = load_tables()
GSM8K, MMLU = TABLES["GSM8K"], TABLES["MMLU"]


@pytest.mark.parametrize("table", TABLES.values())
def test_every_table_is_pinned_to_a_commit(table: Table) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", table.revision)


def test_files_on_the_hub() -> None:
    assert GSM8K.files("train") == ["main/train-00000-of-00001.parquet"]
    assert MMLU.files("auxiliary_train") == ["all/auxiliary_train-00000-of-00001.parquet"]
    assert TABLES["ARC-Easy"].files("test") == ["ARC-Easy/test-00000-of-00001.parquet"]
    assert TABLES["HumanEval"].files("test") == ["openai_humaneval/test-00000-of-00001.parquet"]
    assert TABLES["SmolTalk"].files("test") == ["data/test-00000-of-00001.parquet"]
    assert TABLES["SmolTalk"].files("train")[3] == "data/train-00003-of-00004.parquet"
    with pytest.raises(UsageError, match="openai/gsm8k has no split 'dev': choose from train, t"):
        GSM8K.files("dev")


def test_a_missing_file_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def fetch(url: str, path: Path, check: object, **options: object) -> None:
        fetched.append(url)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")

    monkeypatch.setattr(hub, "download_file", fetch)
    files = TaskFiles(tmp_path)
    for _ in range(2):  # an empty file is no Parquet, but it is there
        with pytest.raises(DataError, match=r"as Parquet .*delete it and run the same command"):
            files.rows(GSM8K, "test")
    (url,) = fetched
    name = "main/test-00000-of-00001.parquet"
    assert url.endswith(f"/datasets/{GSM8K.repository}/resolve/{GSM8K.revision}/{name}")


def test_a_table_without_its_columns_is_fetched_once_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def fetch(url: str, path: Path, check: Check, **options: object) -> None:
        fetched.append(url)
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"question": ["1 + 1?"]}), path)
        check(path)  # the file is what the hub has

    monkeypatch.setattr(hub, "download_file", fetch)
    with pytest.raises(DataError, match="answer"):
        TaskFiles(tmp_path).rows(GSM8K, "test")
    assert len(fetched) == 1


def test_a_local_file_that_is_missing_is_named(local_files: TaskFiles) -> None:
    with pytest.raises(DataError, match=r"no arc/ARC-Easy/train with one of .*there is test.jsonl"):
        local_files.rows(TABLES["ARC-Easy"], "train")
    with pytest.raises(DataError, match=r"no mmlu/dev with one of \.parquet, \.jsonl, \.jsonl\.gz"):
        local_files.rows(MMLU, "dev")


def test_parquet_rows_run_over_files_and_row_groups(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.parquet" for name in "ab"]
    for path, start in zip(paths, (0, 10), strict=True):
        numbers = list(range(start, start + 10))
        nested = [{"text": [str(n)]} for n in numbers]
        pq.write_table(pa.table({"n": numbers, "x": nested, "y": numbers}), path, row_group_size=3)
    rows = read_rows(paths, ["n", "x"])
    assert len(rows) == 20
    assert [rows[i]["n"] for i in range(20)] == list(range(20))
    assert rows[13] == {"n": 13, "x": {"text": ["13"]}}
    with pytest.raises(IndexError):
        rows[20]


def test_parquet_of_another_data_set_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1]}), path)
    with pytest.raises(DataError, match=r"no 'question' and no 'answer' \(it has n\)"):
        read_rows([path], ["question", "n", "answer"])
    pq.write_table(pa.table({"n": [1, 2, None]}), path)
    with pytest.raises(DataError, match=r"a.parquet, row 3: 'n' is null"):
        read_rows([path], ["n"])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cannot read .*a.parquet as Parquet"):
        read_rows([path], ["n"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_plain_or_gzipped(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    content = b'{"n": 1}\n\n  \n{"n": 2, "more": 3}'
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read_rows([path, path], ["n"]) == [{"n": 1}, {"n": 2, "more": 3}] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"n": ', r"a.jsonl:3: not JSON \(.*fix or remove that line"),
        (b"\xff\xfe", r"a.jsonl:3: not UTF-8 text"),
        (b'{"n": null}', r"a.jsonl:3: 'n' is null"),
        (b"[" * 100_000, r"a.jsonl:3: not JSON"),
        (b'{"m": 1}', r"a.jsonl:3 has no 'n' \(it has m\): it is another data set"),
        (b"[1]", r"a.jsonl:3 has no 'n' \(it has no columns\)"),
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
