"""Rank 0 keeps a journal under the run's directory; the other ranks keep nothing."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from archerchat.errors import UsageError
from archerchat.home import Home
from archerchat.training.telemetry import (
    MetricsLog,
    PushCheckpoints,
    TelemetryConfig,
    describe_environment,
    open_run,
)


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
    records = [r for r in recorded(home) if not r.get("name", "").startswith("run/")]
    assert [r["type"] for r in records] == ["session", "metrics", "text", "finish"] * 2
    config = records[0]["config"]
    assert config.pop("environment")["torch"] == torch.__version__
    assert config == {"depth": 4}
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
    end = recorded(Home(tmp_path))[-1]
    assert end["status"] == "failed"
    assert end["reason"] == "RuntimeError: out of memory"


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
    with (
        pytest.raises(UsageError, match=r"does not say whose run.*another name for the run"),
        open_run(Home(tmp_path), "d4", {}),
    ):
        pass


def test_a_session_has_its_tags_its_recipe_and_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/archerchat", "pretrain", "--run", "two words"])
    telemetry = TelemetryConfig(tags=("baseline", "muon"))
    with open_run(Home(tmp_path), "d4", {}, telemetry, group="pretrain"):
        pass
    session = recorded(Home(tmp_path))[0]
    assert (session["tags"], session["group"]) == (["baseline", "muon"], "pretrain")
    assert session["config"]["environment"]["command"] == "archerchat pretrain --run 'two words'"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENDLEX_URL", "ENDLEX_MODE", "ENDLEX_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def checkpoint(home: Home, step: int) -> Path:
    path = home.checkpoint_dir("base", "d4") / f"step_{step:06d}"
    path.mkdir(parents=True)
    (path / "meta.json").write_text(f"of step {step}")
    return path


def pushed(home: Home, push: PushCheckpoints) -> list[tuple[str, list[str], object]]:
    """Save at two steps, the first the best; return name, aliases, what each replaces."""
    telemetry = TelemetryConfig(push_checkpoints=push)
    with open_run(home, "d4", {}, telemetry) as metrics:
        for step in (10, 20):
            path = checkpoint(home, step)
            assert metrics.push_checkpoint(path, step, "last", {"train/tokens": step}) is None
            if step == 10:
                assert metrics.push_checkpoint(path, step, "best", {"val/bpb": 1.5}) is None
            shutil.rmtree(path)  # what `--keep-last` does to it loses nothing
    saved = [record for record in recorded(home) if record["type"] == "checkpoint"]
    for record in saved:
        staged = home.run_dir("d4") / "staged" / record["name"] / "meta.json"
        assert staged.read_text() == f"of step {record['step']}"
    return [(r["name"], r["aliases"], r["metadata"].get("replaces")) for r in saved]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("push", "expected"),
    [
        ("auto", []),  # no server
        ("none", []),
        ("all", [("step_000010", ["last"], None), ("step_000020", ["last"], None)]),
        ("last", [("step_000010", ["last"], "last"), ("step_000020", ["last"], "last")]),
        ("best", [("step_000010", ["best"], "best")]),
    ],
)
def test_the_checkpoints_that_were_asked_for_are_kept_for_the_server(
    tmp_path: Path, push: PushCheckpoints, expected: list[Any]
) -> None:
    assert pushed(Home(tmp_path), push) == expected


@pytest.mark.usefixtures("offline")
def test_a_checkpoint_that_cannot_be_pushed_is_told_and_ends_nothing(tmp_path: Path) -> None:
    telemetry = TelemetryConfig(push_checkpoints="all")
    with open_run(Home(tmp_path), "d4", {}, telemetry) as metrics:
        problem = metrics.push_checkpoint(tmp_path / "step_000007", 7, "last", {})
        assert problem is not None
        assert "step_000007" in problem
        metrics.log({"train/loss": 1.0}, 7)
    assert recorded(Home(tmp_path))[-1]["status"] == "finished"


@pytest.mark.usefixtures("offline")
def test_the_tokenizer_is_pushed_once_a_run_and_with_checkpoints_only(tmp_path: Path) -> None:
    home = Home(tmp_path)
    tokenizer = home.tokenizer_dir("default")
    tokenizer.mkdir(parents=True)
    (tokenizer / "ranks.tiktoken").write_text("ranks")
    pushes: list[PushCheckpoints] = ["none", "last", "last"]
    for push in pushes:
        with open_run(home, "d4", {}, TelemetryConfig(push_checkpoints=push)) as metrics:
            assert metrics.push_tokenizer(tokenizer) is None
    (pushed,) = [record for record in recorded(home) if record["type"] == "checkpoint"]
    assert pushed["name"] == "tokenizer"
    assert pushed["aliases"] == ["keep"]  # `endlex prune` spares it


@pytest.mark.usefixtures("offline")
def test_a_pulled_checkpoint_is_of_the_run_that_goes_on(tmp_path: Path) -> None:
    old, new = Home(tmp_path / "old"), Home(tmp_path / "new")
    with open_run(old, "d4", {}):
        pass
    path = checkpoint(new, 20)
    shutil.copy(old.run_dir("d4") / "run.json", path)  # as `endlex pull` leaves it there
    telemetry = TelemetryConfig(push_checkpoints="all")
    with open_run(new, "d4", {}, telemetry, resumed_from=path) as metrics:
        metrics.push_checkpoint(checkpoint(new, 40), 40, "last", {})
        session = metrics.run.session
    assert run_id(new, "d4") == run_id(old, "d4")
    (record,) = [record for record in recorded(new) if record["type"] == "checkpoint"]
    assert record["name"] == f"step_000040-{session[-6:]}"  # the old machine may have one of 40
    with open_run(new, "other", {}, resumed_from=path):
        pass
    assert run_id(new, "other") != run_id(old, "d4")


@pytest.mark.usefixtures("offline")
def test_a_tokenizer_that_the_server_gave_is_not_pushed_again(tmp_path: Path) -> None:
    home = Home(tmp_path)
    tokenizer = home.tokenizer_dir("default")
    tokenizer.mkdir(parents=True)
    (tokenizer / "ranks.tiktoken").write_text("ranks")
    with open_run(home, "d4", {}, TelemetryConfig(push_checkpoints="last")) as metrics:
        shutil.copy(home.run_dir("d4") / "run.json", tokenizer)
        assert metrics.push_tokenizer(tokenizer) is None
        assert not [record for record in recorded(home) if record["type"] == "checkpoint"]
        (tokenizer / "run.json").write_text("of something else")
        assert metrics.push_tokenizer(tokenizer) is None
    assert [r["name"] for r in recorded(home) if r["type"] == "checkpoint"] == ["tokenizer"]


def run_id(home: Home, tag: str) -> str:
    return str(json.loads((home.run_dir(tag) / "run.json").read_text())["run"])


def test_a_rank_that_records_nothing_pushes_nothing(tmp_path: Path) -> None:
    metrics = MetricsLog(push_checkpoints="all")
    assert metrics.push_checkpoint(tmp_path, 1, "last", {}) is None
    assert metrics.push_tokenizer(tmp_path) is None


def test_the_facts_are_text_and_numbers() -> None:
    facts = describe_environment()
    assert {"torch", "python", "git_commit", "command", "cpus"} <= facts.keys()
    assert json.loads(json.dumps(facts)) == facts
