"""CORE during pretraining: when, after which checkpoint, with what in the journal."""

from __future__ import annotations

import time
from typing import Any

import pytest

from archerchat.training.loop import Loop
from archerchat.training.recipe import Evaluation
from archerchat.training.telemetry import MetricsLog


def test_it_is_measured_after_a_checkpoint_and_logged_apart_from_training(
    tiny_home: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[int, dict[str, float]] = {}
    saved: list[int] = []

    def log(self: MetricsLog, values: Any, step: int) -> None:
        logged.setdefault(step, {}).update({name: float(value) for name, value in values.items()})
        if "core/score" in values:  # a checkpoint is written beside what comes after it
            deadline = time.monotonic() + 60
            while step not in tiny_home.steps("cored"):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            saved.append(step)

    monkeypatch.setattr(MetricsLog, "log", log)
    core = {"core-metric-every": 2, "core-bundle": "offline", "core-metric-max-per-task": 6}
    settings = {"model-tag": "cored", "eval-every": 4, "save-every": 100, "keep-last": 9}
    assert tiny_home.pretrain(**core, **settings) == 0
    assert [step for step, values in logged.items() if "core/score" in values] == [2, 4]
    assert saved == [2, 4]  # step 2 is saved for it
    values = logged[4]
    assert values["core/low"] < values["core/score"] < values["core/high"]
    tasks = [value for name, value in values.items() if name.startswith("core/task/offline_")]
    assert len(tasks) == 6
    assert values["core/score"] == pytest.approx(sum(tasks) / 6)
    assert values["core/seconds"] > 0
    output = capsys.readouterr().out
    assert f"core/score {values['core/score']:.4f}" in output
    assert "core/task" not in output


def test_the_weights_do_not_depend_on_it(tiny_home: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny_home.pretrain(**{"model-tag": "without"}) == 0
    calls: list[int] = []
    evaluate = Loop._evaluate

    def counted(self: Loop, step: int, evaluation: Evaluation) -> None:
        calls.append(step) if evaluation.seconds_name == "core/seconds" else None
        evaluate(self, step, evaluation)

    monkeypatch.setattr(Loop, "_evaluate", counted)
    core = {"core-metric-every": 1, "core-bundle": "offline", "core-metric-max-per-task": 6}
    assert tiny_home.pretrain(**core, **{"model-tag": "with"}) == 0
    assert calls == [1, 2, 3, 4]
    weights = [
        (tiny_home.checkpoint_dir("base", tag) / "step_000004" / "model.safetensors").read_bytes()
        for tag in ("without", "with")
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"core-metric-every": 0}, "--core-metric-every is 0; it must be at least 1"),
        ({"core-metric-max-per-task": 0}, "--core-metric-max-per-task is 0; it must be at least 1"),
        (
            {"core-metric-every": 2, "core-bundle": "nowhere"},
            "--bundle nowhere: there is no such folder",
        ),
    ],
)
def test_nonsense_is_refused_before_training(
    tiny_home: Any, capsys: pytest.CaptureFixture[str], flags: dict[str, Any], message: str
) -> None:
    assert tiny_home.pretrain(**{"model-tag": "wrong"}, **flags) == 2
    assert message in capsys.readouterr().err
    assert not tiny_home.checkpoint_dir("base", "wrong").exists()
