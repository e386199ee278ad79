"""Where tasks find their files: pinned on the hub, cached under home, or in a local folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from archerchat.errors import DataError, UsageError
from archerchat.tasks.hub import ARC, GSM8K, HUMANEVAL, MMLU, SMOLTALK, TaskFiles


@pytest.mark.parametrize("table", [SMOLTALK, MMLU, GSM8K, HUMANEVAL, *ARC.values()])
def test_every_table_is_pinned_to_a_commit(table: object) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", table.revision)  # type: ignore[attr-defined]


def test_files_on_the_hub() -> None:
    assert GSM8K.files("train") == ("main/train-00000-of-00001.parquet",)
    assert MMLU.files("auxiliary_train") == ("all/auxiliary_train-00000-of-00001.parquet",)
    assert ARC["ARC-Easy"].files("test") == ("ARC-Easy/test-00000-of-00001.parquet",)
    assert HUMANEVAL.files("test") == ("openai_humaneval/test-00000-of-00001.parquet",)
    assert SMOLTALK.files("test") == ("data/test-00000-of-00001.parquet",)
    assert SMOLTALK.files("train")[3] == "data/train-00003-of-00004.parquet"
    with pytest.raises(UsageError, match="openai/gsm8k has no split 'dev': choose from train, t"):
        GSM8K.files("dev")


def test_a_missing_file_is_fetched_once(tmp_path: Path) -> None:
    fetched = []

    def fetch(repository: str, revision: str, name: str, path: Path) -> None:
        fetched.append((repository, revision, name))
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")

    files = TaskFiles(tmp_path, fetch=fetch)
    for _ in range(2):  # an empty file is no Parquet, but it is there
        with pytest.raises(DataError, match=r"as Parquet .*delete it and run the same command"):
            files.rows(GSM8K, "test")
    assert fetched == [(GSM8K.repository, GSM8K.revision, "main/test-00000-of-00001.parquet")]


def test_without_a_way_to_fetch_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"openai--gsm8k.* is not there .*--data-dir"):
        TaskFiles(tmp_path).rows(GSM8K, "test")


def test_a_local_file_that_is_missing_is_named(local_files: TaskFiles) -> None:
    with pytest.raises(DataError, match=r"no arc/ARC-Easy/train with one of .*there is test.jsonl"):
        local_files.rows(ARC["ARC-Easy"], "train")
    with pytest.raises(DataError, match=r"no mmlu/dev with one of \.parquet, \.jsonl, \.jsonl\.gz"):
        local_files.rows(MMLU, "dev")
