"""`endlex import`, all the way to the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "importers" / "fixtures"


def test_wandb_to_the_server(cli: Any, online: str, place: Path) -> None:
    status, out, _ = cli("import", "wandb", FIXTURES / "wandb")
    assert status == 0
    assert "1 x histogram" in out
    command = out.rpartition("endlex ")[2].split()
    assert cli(*command)[0] == 0
    shown = json.loads(cli("show", "abcdefgh", "--json")[1])
    assert shown["config"] == {"depth": 12, "late": "yes", "optim": {"lr": 0.02}}
    assert shown["summary"]["val/bpb"] == 1.5
    assert {m["name"]: m["count"] for m in shown["metrics"]}["train/loss"] == 11
    assert cli("verify", "abcdefgh")[0] == 0


def test_tensorboard_to_the_server(cli: Any, online: str, place: Path) -> None:
    assert cli("import", "tensorboard", FIXTURES / "tensorboard", "--project", "tb")[0] == 0
    assert cli("sync", "endlex-runs/tb")[0] == 0
    page = json.loads(cli("ls", "--project", "tb", "--json")[1])
    assert sorted(run["name"] for run in page["runs"]) == ["tensors", "torch", "torch/hp"]
    assert cli("verify")[0] == 0


def test_one_that_fails_does_not_keep_the_others_back(cli: Any, place: Path) -> None:
    assert cli("import", "wandb", FIXTURES / "wandb", "--to", "runs")[0] == 0
    status, out, _ = cli("import", "wandb", FIXTURES / "wandb", "--to", "runs")
    assert status == 1
    assert "is there already" in out
    assert cli("import", "wandb", "nowhere")[0] == 2
    status, _, err = cli("import", "tensorboard", place)
    assert status == 1
    assert "no event files" in err
