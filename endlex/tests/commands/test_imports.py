"""`endlex import`, all the way to the server."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from endlex.importers.run_directory import RunWriter

needs_wandb, needs_tensorboard = (
    pytest.mark.skipif(find_spec(name) is None, reason="needs the extra endlex[import]")
    for name in ("wandb", "tensorboard")
)
FIXTURES = Path(__file__).parents[1] / "importers" / "fixtures"


@needs_wandb
def test_wandb_to_the_server(cli: Any, online: str, place: Path) -> None:
    status, out, _ = cli("import", "wandb", FIXTURES / "wandb")
    assert status == 0
    assert "2 tables" in out
    command = out.rpartition("endlex ")[2].split()
    assert cli(*command)[0] == 0
    shown = json.loads(cli("show", "abcdefgh", "--json")[1])
    assert shown["config"] == {"depth": 12, "late": "yes", "optim": {"lr": 0.02}}
    assert shown["summary"]["val/bpb"] == 1.5
    assert {m["name"]: m["count"] for m in shown["metrics"]}["train/loss"] == 11
    assert cli("verify", "abcdefgh")[0] == 0


@needs_tensorboard
def test_tensorboard_to_the_server(cli: Any, online: str, place: Path) -> None:
    assert cli("import", "tensorboard", FIXTURES / "tensorboard", "--project", "tb")[0] == 0
    assert cli("sync", "endlex-runs/tb")[0] == 0
    page = json.loads(cli("ls", "--project", "tb", "--json")[1])
    assert sorted(run["name"] for run in page["runs"]) == ["tensors", "torch", "torch/hp"]
    assert cli("verify")[0] == 0


@needs_wandb
def test_one_that_fails_does_not_keep_the_others_back(cli: Any, place: Path) -> None:
    assert cli("import", "wandb", FIXTURES / "wandb", "--to", "runs")[0] == 0
    (place / "b.wandb").write_bytes((FIXTURES / "wandb" / "run-abcdefgh.wandb").read_bytes())
    (place / "a.wandb").write_bytes(b":W&B")
    status, out, _ = cli("import", "wandb", place, "--to", "runs")
    assert (status, out.count("not imported"), out.count(" -> ")) == (1, 1, 1)
    assert cli("import", "wandb", "nowhere")[0] == 2
    status, _, err = cli("import", "tensorboard", place)
    assert status == 1
    assert "no event files" in err


def test_several_files_of_one_run_are_sessions_of_it(
    cli: Any, online: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three offline folders of a run that was resumed twice: 20 steps in each."""

    def import_part(file: Path, root: Path, project: str | None) -> RunWriter:
        begun = 1.7e9 + int(file.stem)
        with RunWriter(root, "wandb", "p/resumed01", "p", "r", begun, run="resumed001") as writer:
            for step in range(int(file.stem) * 20, int(file.stem) * 20 + 20):
                writer.metrics((step, 1.7e9 + step), {"loss": 1.0})
        return writer

    monkeypatch.setattr("endlex.importers.wandb.import_wandb", import_part)
    for part in range(3):
        (place / "wandb" / f"{part}").mkdir(parents=True)
        (place / "wandb" / f"{part}" / f"{part}.wandb").touch()
        # On machines of their own, or one after the other: the run is the same.
        assert cli("import", "wandb", f"wandb/{part}", "--to", f"machine{part}")[0] == 0
        assert cli("import", "wandb", f"wandb/{part}", "--to", "together")[0] == 0
    assert cli("sync", *(f"machine{part}" for part in range(3)))[0] == 0
    shown = json.loads(cli("show", "resumed001", "--json")[1])
    assert [(m["count"], m["last_step"]) for m in shown["metrics"]] == [(60, 59)]
    assert cli("verify", "machine0", "machine1", "machine2", "together")[0] == 0
