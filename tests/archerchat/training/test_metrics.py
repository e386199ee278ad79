"""Rank 0 keeps a journal under the run's directory; the other ranks keep nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from archerchat.artifacts import Home
from archerchat.errors import UsageError
from archerchat.training.metrics import open_run


def recorded(home: Home) -> list[dict[str, Any]]:
    """All records of run `d4`, its sessions in order."""
    files = sorted((home.run_dir("d4") / "journal").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_rank_0_writes_a_journal_that_a_resumed_run_continues(tmp_path: Path) -> None:
    home = Home(tmp_path)
    for step in (0, 20):
        with open_run(home, "d4", {"depth": 4}) as metrics:
            metrics.log({"train/loss": torch.tensor(2.5), "val/bpb": math.inf}, step)
            metrics.log_text("sample", "def main():", step)
    records = recorded(home)
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
    assert recorded(Home(tmp_path))[-1]["status"] == "failed"


def test_ctrl_c_is_recorded_as_such(tmp_path: Path) -> None:
    def train() -> None:
        with open_run(Home(tmp_path), "d4", {}):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert recorded(Home(tmp_path))[-1]["status"] == "interrupted"


def test_a_damaged_run_directory_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "d4" / "run.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    with pytest.raises(UsageError, match=r"does not say whose run.*another name for the run"):
        open_run(Home(tmp_path), "d4", {})
