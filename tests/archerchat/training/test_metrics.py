"""Rank 0 keeps a journal under the run's directory; the other ranks keep nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from archerchat.artifacts import Home
from archerchat.errors import UsageError
from archerchat.training.metrics import open_run


def test_rank_0_writes_a_journal_that_a_resumed_run_continues(tmp_path: Path) -> None:
    home = Home(tmp_path)
    for step in (0, 20):
        with open_run(home, "d4", {"depth": 4}) as metrics:
            metrics.log({"train/loss": torch.tensor(2.5), "val/bpb": math.inf}, step)
            metrics.log_text("sample", "def main():", step)
    lines = (tmp_path / "runs" / "d4" / "journal.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["type"] for r in records] == ["session", "metrics", "text", "finish"] * 2
    assert records[0]["config"] == {"depth": 4}
    assert records[5]["values"] == {"train/loss": 2.5, "val/bpb": "Infinity"}
    assert records[0]["session"] != records[4]["session"]
    assert records[-1]["status"] == "finished"


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with open_run(Home(tmp_path), "d4", {}, rank=1) as metrics:
        metrics.log({"train/loss": 2.5}, 0)
        metrics.log_text("sample", "text", 0)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_is_recorded(tmp_path: Path) -> None:
    def train() -> None:
        with open_run(Home(tmp_path), "d4", {}):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train()
    last = (tmp_path / "runs" / "d4" / "journal.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["status"] == "failed"


def test_a_damaged_journal_is_reported(tmp_path: Path) -> None:
    journal = tmp_path / "runs" / "d4" / "journal.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_text('broken\n{"type": "metrics"}\n')
    with pytest.raises(UsageError, match=r"line 1 is not a record.*another name for the run"):
        open_run(Home(tmp_path), "d4", {})
