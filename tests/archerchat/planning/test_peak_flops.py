"""The peak rate: from the table, from the cache, or measured, and never useless."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from archerchat.planning import peak_flops as module
from archerchat.planning.gpus import find_gpu
from archerchat.planning.peak_flops import (
    CACHE_FILE,
    Measurement,
    cache_key,
    measure_peak,
    peak_flops,
)
from archerchat.runtime import Runtime, build_runtime

CPU = Runtime(torch.device("cpu"), torch.float32, "Test CPU", "forced")


def _cuda(name: str, dtype: torch.dtype) -> Runtime:
    return Runtime(torch.device("cuda", 0), dtype, name, "forced")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Runtime]:
    """Replace the measurement by 1.5 TFLOP/s, and record who asked for it."""
    calls: list[Runtime] = []

    def measure(runtime: Runtime) -> Measurement:
        calls.append(runtime)
        return Measurement(1.5e12, (2048, 256, 1024), "bfloat16")

    monkeypatch.setattr(module, "measure_peak", measure)
    return calls


def test_known_cards_come_from_the_table(tmp_path: Path, measured: list[Runtime]) -> None:
    peak = peak_flops(_cuda("NVIDIA GeForce RTX 4070 Ti SUPER", torch.bfloat16), tmp_path)
    assert peak.flops_per_second == 88.2e12
    assert peak.source == "table: RTX 4070 Ti SUPER, dense bfloat16, float32 accumulate"
    assert not measured
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "runtime",
    [
        CPU,
        _cuda("NVIDIA H200", torch.float32),
        _cuda("NVIDIA Future 9000", torch.bfloat16),
        _cuda("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16),
        _cuda("Tesla V100-SXM2-16GB", torch.bfloat16),
        Runtime(torch.device("cpu"), torch.bfloat16, "pretends to be an RTX 4090", "forced"),
    ],
)
def test_anything_else_is_measured_once(
    tmp_path: Path, measured: list[Runtime], runtime: Runtime
) -> None:
    first, second = peak_flops(runtime, tmp_path), peak_flops(runtime, tmp_path)
    assert first.flops_per_second == second.flops_per_second == 1.5e12
    assert measured == [runtime]
    assert first.source.startswith("measured: 2048x256x1024 bfloat16 product on ")
    assert runtime.device_name in first.source
    assert first.source.endswith(f"delete {tmp_path / CACHE_FILE}), just now")
    assert second.source.endswith(f"delete {tmp_path / CACHE_FILE}), cached")


def test_the_key_holds_whatever_changes_the_rate(
    tmp_path: Path, measured: list[Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    peak_flops(CPU, tmp_path)
    peak_flops(Runtime(CPU.device, torch.bfloat16, CPU.device_name, "forced"), tmp_path)
    peak_flops(Runtime(CPU.device, CPU.compute_dtype, "Other CPU", "forced"), tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    peak_flops(CPU, tmp_path)
    monkeypatch.setattr(torch, "__version__", "99.0")
    peak_flops(CPU, tmp_path)
    assert len(measured) == 5
    assert len(json.loads((tmp_path / CACHE_FILE).read_text())) == 5


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1, 2]",
        "\x00\xff",
        '{"KEY": null}',
        '{"KEY": {"flops_per_second": 2e12, "size": 512}}',
    ],
)
def test_a_cache_of_no_use_is_measured_again(
    tmp_path: Path, measured: list[Runtime], content: str
) -> None:
    """A broken file, or an entry of another version."""
    (tmp_path / CACHE_FILE).write_bytes(content.replace("KEY", cache_key(CPU)).encode("latin-1"))
    assert peak_flops(CPU, tmp_path).flops_per_second == 1.5e12
    assert peak_flops(CPU, tmp_path).flops_per_second == 1.5e12
    assert len(measured) == 1


def test_other_entries_survive(tmp_path: Path, measured: list[Runtime]) -> None:
    entry = {"flops_per_second": 3e12, "shape": [512, 512, 512], "dtype": "float32"}
    (tmp_path / CACHE_FILE).write_text(json.dumps({"another machine": entry}))
    peak_flops(CPU, tmp_path)
    kept = json.loads((tmp_path / CACHE_FILE).read_text())
    assert kept.keys() == {"another machine", cache_key(CPU)}
    assert kept["another machine"] == entry


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, measured: list[Runtime]
) -> None:
    (tmp_path / "file").write_text("in the way")
    peak = peak_flops(CPU, tmp_path / "file")
    assert peak.flops_per_second == 1.5e12
    assert "delete" not in peak.source


def test_a_real_measurement_is_plausible_and_leaves_no_trace() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    measured = measure_peak(CPU, seconds=0.05)
    assert torch.equal(torch.rand(3), expected)
    assert measured.shape in module.CPU_SHAPES
    assert math.isfinite(measured.flops_per_second)
    assert 1e8 < measured.flops_per_second < 1e15


def _measure_with(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, rates: Callable[..., float]
) -> Measurement:
    """Measure where each slot's rate is what `rates(shape, dtype)` gives, in no time at all."""
    monkeypatch.setattr(
        module, "_product_rate", lambda runtime, shape, dtype, seconds: rates(shape, dtype)
    )
    return measure_peak(runtime)


def test_a_trainings_own_shape_may_be_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    best = (2048, 256, 1024)
    measured = _measure_with(monkeypatch, CPU, lambda shape, dtype: 3e12 if shape == best else 2e12)
    assert measured == Measurement(3e12, best, "float32")


def test_a_busy_moment_spoils_no_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def busy_at_first(shape: object, dtype: torch.dtype) -> float:
        seen.append(shape)
        return 2e12 if seen.count(shape) == module.ROUNDS else 1e12

    assert _measure_with(monkeypatch, CPU, busy_at_first).flops_per_second == 2e12
    assert {seen.count(shape) for shape in module.CPU_SHAPES} == {module.ROUNDS}


def test_a_dtype_that_a_cpu_only_emulates_is_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(shape: object, dtype: torch.dtype) -> float:
        return 2e12 if dtype == torch.float32 else 1e11

    half = Runtime(torch.device("cpu"), torch.float16, "Test CPU", "forced")
    measured = _measure_with(monkeypatch, half, rate)
    assert (measured.flops_per_second, measured.dtype) == (2e12, "float32")
    card = _measure_with(monkeypatch, _cuda("NVIDIA Future 9000", torch.float16), rate)
    assert (card.flops_per_second, card.dtype) == (1e11, "float16")


def test_shapes_that_would_take_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[object] = set()

    def slow(shape: object, dtype: torch.dtype) -> float:
        seen.add(shape)
        return 1e9

    assert _measure_with(monkeypatch, CPU, slow).flops_per_second == 1e9
    assert seen == {(512, 512, 512)}


@pytest.mark.gpu
def test_a_card_is_measured_below_its_published_rate() -> None:
    runtime = build_runtime("cuda", "bfloat16")
    rate, gpu = measure_peak(runtime).flops_per_second, find_gpu(runtime.device_name)
    published = gpu.flops_per_second(torch.bfloat16) if gpu else None
    assert rate > 1e12
    assert published is None or 0.3 < rate / published < 1.1
