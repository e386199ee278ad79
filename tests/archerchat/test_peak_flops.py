"""The peak rate: from the table, from the cache, or measured, and never useless."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from archerchat import peak_flops as module
from archerchat.peak_flops import CACHE_FILE, cache_key, measure_peak, peak_flops
from archerchat.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32, "Test CPU", "forced")


def _cuda(name: str, dtype: torch.dtype) -> Runtime:
    return Runtime(torch.device("cuda", 0), dtype, name, "forced")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Runtime]:
    """Replace the measurement by 1.5 TFLOP/s, and record who asked for it."""
    calls: list[Runtime] = []

    def measure(runtime: Runtime) -> tuple[float, int]:
        calls.append(runtime)
        return 1.5e12, 2048

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
    assert first.source.startswith("measured: 2048x2048x2048 ")
    assert runtime.device_name in first.source
    assert first.source.endswith("just now")
    assert second.source == first.source.replace("just now", "cached")


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
        '{"KEY": {"flops_per_second": 0.0, "size": 512}}',
        '{"KEY": {"flops_per_second": -1.0, "size": 512}}',
        '{"KEY": {"flops_per_second": NaN, "size": 512}}',
        '{"KEY": {"flops_per_second": Infinity, "size": 512}}',
        '{"KEY": {"flops_per_second": 1e300, "size": 512}}',
        '{"KEY": {"flops_per_second": "fast", "size": 512}}',
        '{"KEY": {"flops_per_second": true, "size": 512}}',
        '{"KEY": {"flops_per_second": 2e12}}',
    ],
)
def test_a_corrupt_cache_is_measured_again(
    tmp_path: Path, measured: list[Runtime], content: str
) -> None:
    (tmp_path / CACHE_FILE).write_bytes(content.replace("KEY", cache_key(CPU)).encode("latin-1"))
    assert peak_flops(CPU, tmp_path).flops_per_second == 1.5e12
    assert peak_flops(CPU, tmp_path).source.endswith("cached")
    assert len(measured) == 1


def test_other_entries_survive(tmp_path: Path, measured: list[Runtime]) -> None:
    entry = {"flops_per_second": 3e12, "size": 512}
    (tmp_path / CACHE_FILE).write_text(json.dumps({"another machine": entry, "broken": 1}))
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
    assert "not cached" in peak.source


def test_a_real_measurement_is_plausible_and_leaves_no_trace() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    rate, size = measure_peak(CPU, seconds=0.05)
    assert torch.equal(torch.rand(3), expected)
    assert size >= 512
    assert math.isfinite(rate)
    assert 1e8 < rate < 1e15
