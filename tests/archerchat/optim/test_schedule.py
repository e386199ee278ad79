"""The three schedules against the reference's, and at their corners."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from archerchat.dial import DialConfig, build_hyperparameters
from archerchat.optim.schedule import Schedule, build_schedule


def _exact(value: Any) -> Any:
    return pytest.approx(value, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("name", ["depth12", "short_200_iterations"])
def test_schedules_equal_the_reference(oracle_dir: Path, name: str) -> None:
    golden = json.loads((oracle_dir / "scaling_table.json").read_text())["schedules"][name]
    weight_decay = golden["points"][0]["weight_decay"]
    schedule = Schedule(golden["num_iterations"], weight_decay)
    assert schedule.warmdown_steps == golden["warmdown_iters"]
    assert len(golden["points"]) >= 15
    for point in golden["points"]:
        it = point["step"]
        assert schedule.lr_multiplier(it) == _exact(point["lr_multiplier"]), it
        assert schedule.muon_momentum(it) == _exact(point["muon_momentum"]), it
        assert schedule.muon_weight_decay(it) == _exact(point["weight_decay"]), it


def test_every_step_of_the_training_curves(oracle_dir: Path) -> None:
    runs = json.loads((oracle_dir / "train_curve.json").read_text())["runs"]
    for run in runs.values():
        args = run["args"]
        schedule = Schedule(
            args["num_iterations"],
            run["weight_decay_scaled"],
            args["warmup_steps"],
            args["warmdown_ratio"],
            args["final_lr_frac"],
        )
        steps = range(args["num_iterations"])
        assert [schedule.lr_multiplier(it) for it in steps] == _exact(run["lr_multiplier"])
        assert [schedule.muon_momentum(it) for it in steps] == _exact(run["muon_momentum"])
        decay = [schedule.muon_weight_decay(it) for it in steps]
        assert decay == _exact(run["muon_weight_decay"])


def test_build_schedule_takes_the_dials_values() -> None:
    config = DialConfig(depth=12, warmup_steps=3, warmdown_ratio=0.5, final_lr_frac=0.1)
    schedule = build_schedule(config, build_hyperparameters(config, 32768))
    assert schedule == Schedule(2520, 0.28, 3, 0.5, 0.1)
    assert schedule.lr_multiplier(2520) == pytest.approx(0.1)


def test_warmup_wins_over_warmdown() -> None:
    schedule = Schedule(num_iterations=30, weight_decay=0.1)
    assert [schedule.lr_multiplier(it) for it in (0, 29)] == [1 / 40, 30 / 40]
    assert schedule.muon_momentum(29) == _exact(0.85 + 0.12 * 29 / 400)


def test_no_warmup_and_no_warmdown_hold_the_rate() -> None:
    schedule = Schedule(500, 0.1, warmup_steps=0, warmdown_ratio=0.0)
    assert {schedule.lr_multiplier(it) for it in range(501)} == {1.0}
    assert schedule.muon_momentum(500) == 0.97


def test_all_warmdown_ends_at_the_rest() -> None:
    schedule = Schedule(10, 0.1, warmup_steps=0, warmdown_ratio=1.0, final_lr_frac=0.0)
    assert schedule.lr_multiplier(0) == 1.0
    assert schedule.lr_multiplier(5) == 0.5
    assert schedule.lr_multiplier(10) == 0.0
    assert schedule.muon_weight_decay(10) == 0.0


@pytest.mark.parametrize("it", [-1, 11])
def test_iterations_outside_the_run_are_refused(it: int) -> None:
    schedule = Schedule(10, 0.1)
    for method in (schedule.lr_multiplier, schedule.muon_momentum, schedule.muon_weight_decay):
        with pytest.raises(AssertionError):
            method(it)
