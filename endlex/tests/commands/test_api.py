"""`endlex.Api`: what a program finds out about runs, and that it changes nothing unasked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import endlex


@pytest.fixture
def project(cli: Any, train: Any, online: str, request: pytest.FixtureRequest) -> str:
    name = str(request.node.name)
    made = [
        train(f"d{depth}", depth // 4, project=name, config={"depth": depth, "o": {"lr": 0.1}})
        for depth in (12, 20)
    ]
    assert cli("sync", *made)[0] == 0
    return name


def test_runs_are_found_with_their_configuration(project: str) -> None:
    api = endlex.Api()
    found = api.runs(f"project:{project} depth >= 20")
    assert [(run.name, run.config["o"]["lr"], run.status) for run in found] == [
        ("d20", 0.1, "finished")
    ]
    assert [run.name for run in api.runs(f"project:{project}", sort="val/bpb", limit=1)] == ["d20"]
    run = api.run(f"{project}/d12")
    assert run.summary == {"train/loss": 1.0, "val/bpb": 0.8}
    assert run.metrics["val/bpb"]["min"] == 0.8
    assert run.url == f"{api.url}/runs/{run.id}"
    with pytest.raises(endlex.EndlexError, match="has no run 'none'"):
        api.run("none")
    with pytest.raises(endlex.EndlexError, match=r"did you mean val/bpb\?"):
        api.runs("val/bbp < 1")


def test_it_changes_nothing_unless_it_may(project: str) -> None:
    with pytest.raises(endlex.EndlexError, match="read_only=False"):
        endlex.Api().run(f"{project}/d12").update(tags=["x"])
    run = endlex.Api(read_only=False).run(f"{project}/d12")
    run.update(tags=["x"])
    assert endlex.Api().run(f"{project}/d12").tags == ["x"]
    run.update(tags=[])


def test_a_checkpoint_is_downloaded_by_its_alias(
    cli: Any, train: Any, online: str, place: Path
) -> None:
    assert cli("sync", train("saved", project="api2", save=b"weights"))[0] == 0
    (file,) = endlex.Api().run("api2/saved").download("best", place / "out")
    assert file.read_bytes() == b"weights"


@pytest.mark.parametrize("frame", ["pandas", "polars"])
def test_the_history_is_a_frame(cli: Any, online: str, frame: str) -> None:
    pytest.importorskip(frame)
    run = endlex.init("frames", frame, mode="offline")
    run.log({"loss": 2.0, "n": 1}, step=0)
    run.log({"loss": float("nan")}, step=1)
    run.log({"loss": float("-inf"), "n": 3}, step=2)
    run.finish()
    assert cli("sync", run.directory)[0] == 0
    found = endlex.Api().run(run.id)
    wide = found.history(frame=frame)
    assert list(wide.columns) == ["step", "loss", "n"]
    assert list(wide["step"]) == [0, 1, 2]
    loss = list(wide["loss"])
    assert loss[0] == 2.0
    assert math.isnan(loss[1])
    assert loss[2] == -math.inf
    long = found.history(["n"], frame=frame, long=True)
    assert (list(long["step"]), list(long["value"])) == ([0, 2], [1.0, 3.0])


@pytest.mark.parametrize("frame", ["pandas", "polars"])
@pytest.mark.parametrize("name", ["null", "NaN", "7"])
def test_a_metric_keeps_its_name_in_a_frame(cli: Any, online: str, frame: str, name: str) -> None:
    pytest.importorskip(frame)
    run = endlex.init("frames", frame, mode="offline", resume="never")
    run.log({name: 2.0}, step=0)
    run.finish()
    assert cli("sync", run.directory)[0] == 0
    found = endlex.Api().run(run.id)
    assert list(found.history([name], frame=frame, long=True)["metric"]) == [name]
    assert list(found.history(frame=frame).columns) == ["step", name]
