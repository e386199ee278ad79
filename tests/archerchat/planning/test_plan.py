"""The plan's arithmetic, against the runs that SPEC section 11 reports, and its refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from archerchat.dial import DialConfig
from archerchat.errors import UsageError
from archerchat.planning.gpus import Prices
from archerchat.planning.peak_flops import Measurement, peak_flops
from archerchat.planning.plan import TRAIN_SHARDS, PlanConfig, build_plan
from archerchat.runtime import Runtime, choose_dtype, dtype_name


def _plan(
    tmp_path: Path, depth: int = 12, dial: dict[str, Any] | None = None, **fields: Any
) -> Any:
    """Return what `archerchat plan --json` prints, with attributes instead of keys."""
    fields.setdefault("gpu", "RTX 5060 Ti")
    prices = {name: fields.pop(name) for name in [*fields] if name.startswith("price_")}
    fields["prices"] = Prices(**prices)
    content = build_plan(PlanConfig(DialConfig(depth, **(dial or {})), **fields), tmp_path)
    return json.loads(json.dumps(content), object_hook=lambda found: SimpleNamespace(**found))


@pytest.mark.parametrize(("depth", "minutes"), [(8, 76.7), (12, 481.0)])
def test_times_on_the_5060_ti_are_near_the_measured_ones(
    tmp_path: Path, depth: int, minutes: float
) -> None:
    plan = _plan(tmp_path, depth)
    training = plan.time.hours - plan.time.evaluation_hours
    assert training * 60 == pytest.approx(minutes, rel=0.15)


def test_the_gpt2_run_costs_what_was_reported(tmp_path: Path) -> None:
    """The seeds report $48 to $73 for d24 at ratio 8 on eight H100s, with fp8 and without."""
    plan = _plan(tmp_path, 24, {"target_param_data_ratio": 8}, gpu="H100", num_gpus=8)
    assert plan.time.cost is not None
    assert 40 < plan.time.cost < 80
    assert plan.time.price_per_hour == pytest.approx(3.0)
    assert "assumed" in plan.time.price_note
    assert plan.memory.grad_accum_steps is not None
    size = plan.memory.device_batch_size
    assert size is not None
    assert size * 2048 * 8 * plan.memory.grad_accum_steps == plan.hyperparameters.total_batch_tokens


def test_hours_follow_flops_rate_and_mfu(tmp_path: Path) -> None:
    plan = _plan(tmp_path, mfu=0.5, num_gpus=2, gpu="A100 80GB", price_per_hour=2.0)
    flops = plan.hyperparameters.total_flops
    assert plan.time.num_evaluations == 11  # 2,520 steps
    flops += 11 * 41_943_040 * plan.hyperparameters.flops_per_token // 3
    hours = flops / (2 * 312e12 * 0.5) / 3600
    assert plan.time.hours == pytest.approx(hours)
    assert plan.time.cost == pytest.approx(2 * 2.0 * hours)
    assert plan.time.kwh == pytest.approx(2 * 0.4 * hours)
    assert plan.time.price_note == "$2.00 per hour and device"
    silent = _plan(tmp_path, mfu=0.5, num_gpus=2, gpu="A100 80GB", eval_every=None)
    assert (silent.time.num_evaluations, silent.time.evaluation_hours) == (0, 0)
    assert silent.time.tokens_per_second * silent.time.hours * 3600 == pytest.approx(
        plan.hyperparameters.total_tokens
    )


def test_electricity_at_home(tmp_path: Path) -> None:
    plan = _plan(tmp_path, price_per_kwh=0.5)
    assert plan.time.kwh == pytest.approx(0.18 * plan.time.hours)
    assert plan.time.cost == pytest.approx(0.5 * 0.18 * plan.time.hours)
    assert "180 W at $0.50 per kWh" in plan.time.price_note


def test_shards_cover_the_tokens(tmp_path: Path) -> None:
    plan = _plan(tmp_path, tokens_per_shard=10_000_000)
    assert plan.data.train_shards == 133  # 1.3212e9 tokens
    assert plan.data.epochs == 1.0
    small = _plan(tmp_path, tokens_per_shard=100_000)
    assert small.data.train_shards == TRAIN_SHARDS
    assert small.data.epochs == pytest.approx(1321205760 / (TRAIN_SHARDS * 100_000))
    estimated = _plan(tmp_path).data
    assert 25_000_000 < estimated.tokens_per_shard < 60_000_000


def test_schedule_turns_are_listed(tmp_path: Path) -> None:
    points = _plan(tmp_path).schedule_points
    assert [it for it, *_ in points] == [0, 40, 400, 882, 2520]
    assert points[0][1:] == pytest.approx([0.025, 0.85, 0.28])
    assert points[-1][1:] == pytest.approx([0.05, 0.90, 0.0])
    short = _plan(tmp_path, dial={"num_iterations": 30}).schedule_points
    assert [it for it, *_ in short] == [0, 10, 30]


def test_a_smaller_card_takes_a_smaller_batch(tmp_path: Path) -> None:
    sizes = [
        _plan(tmp_path, gpu_memory=gib).memory.device_batch_size or 0 for gib in (4, 8, 16, 32, 80)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] == 0
    assert sizes[-1] > sizes[1] > 0
    for size in sizes:
        assert size & (size - 1) == 0


def test_a_model_that_does_not_fit_is_a_plan_not_an_error(tmp_path: Path) -> None:
    memory = _plan(tmp_path, 26, gpu="RTX 3070").memory
    assert memory.device_batch_size is None
    assert memory.grad_accum_steps is None
    assert memory.peak_bytes > memory.device_bytes


@pytest.mark.parametrize(
    ("name", "capability", "rate"),
    [
        ("V100", (7, 0), 15.7e12),
        ("V100 PCIe", (7, 0), 14.0e12),
        ("T4", (7, 5), 8.1e12),
        ("A100", (8, 0), 312e12),
    ],
)
def test_a_named_card_is_planned_in_what_training_would_use_on_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    rate: float,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dtype, _ = choose_dtype(torch.device("cuda", 0), None)
    machine = _plan(tmp_path, gpu=name).machine
    assert machine.compute_dtype == dtype_name(dtype)
    assert machine.flops_per_second == rate
    runtime = Runtime(torch.device("cuda", 0), dtype, name, "chosen")
    assert peak_flops(runtime, tmp_path).flops_per_second == rate


def test_without_a_name_this_machine_is_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(torch.device("cpu"), torch.float32, "Test CPU", "forced")
    monkeypatch.setattr("archerchat.planning.plan.build_runtime", lambda: runtime)
    measured = Measurement(2e12, (512, 512, 512), "float32")
    monkeypatch.setattr("archerchat.planning.peak_flops.measure_peak", lambda runtime: measured)
    plan = _plan(tmp_path, 4, gpu=None)
    assert plan.machine.name == "Test CPU"
    assert plan.machine.flops_per_second == 2e12
    assert plan.machine.flops_source.startswith("measured")
    assert plan.machine.memory_bytes == runtime.total_memory_bytes()
    assert plan.time.cost is None
    assert plan.time.kwh is None
    assert "--price-per-hour" in plan.time.price_note


def test_without_a_name_a_known_card_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "NVIDIA GeForce RTX 3090"
    runtime = Runtime(torch.device("cuda", 0), torch.bfloat16, name, "forced")
    properties = type("Properties", (), {"total_memory": 24 * 2**30})()
    monkeypatch.setattr("archerchat.planning.plan.build_runtime", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    machine = _plan(tmp_path, 4, gpu=None).machine
    named = _plan(tmp_path, 4, gpu="3090").machine
    assert machine.memory_bytes == 24 * 2**30
    for field in ("device_type", "compute_dtype", "flops_per_second", "assumed_mfu", "gpu"):
        assert getattr(machine, field) == getattr(named, field)


def test_an_unknown_card_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        _plan(tmp_path, gpu="Voodoo 2")
    assert "'Voodoo 2'" in str(error.value)
    assert "RTX 5060 Ti" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_gpus": 0}, "--num-gpus is 0"),
        ({"num_gpus": 3}, "total batch|batch of 524288 tokens"),
        ({"mfu": 0.0}, "--mfu is 0.0"),
        ({"mfu": 1.5}, "--mfu is 1.5"),
        ({"gpu_memory": -1.0}, "--gpu-memory is -1.0"),
        ({"price_per_hour": -1.0}, "--price-per-hour is -1.0"),
        ({"price_per_kwh": float("nan")}, "--price-per-kwh is nan"),
        ({"tokens_per_shard": 0}, "--tokens-per-shard is 0"),
        ({"vocab_size": 0}, "--vocab-size is 0"),
    ],
)
def test_numbers_that_make_no_sense_are_named(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        _plan(tmp_path, **fields)


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PlanConfig(DialConfig(12)).num_gpus = 2  # type: ignore[misc]
