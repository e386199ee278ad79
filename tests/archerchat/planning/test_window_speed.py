"""Backends for windows are timed once for a machine and shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from archerchat.model.config import ModelConfig
from archerchat.planning.window_speed import CACHE_FILE, fastest_for_windows
from archerchat.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32, "a CPU", "forced")
CONFIG = ModelConfig(256, 300, 4, 2, 1, 64, "SSSL")


def test_the_faster_is_taken_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called, answers = 0, iter([0.004, 0.002])

    def median_seconds(runtime: Runtime, work: Callable[[], object]) -> float:
        nonlocal called
        called += 1
        work()  # forward and backward do run
        return next(answers)

    monkeypatch.setattr(Runtime, "median_seconds", median_seconds)
    candidates = ("sdpa", "matmul")
    first = fastest_for_windows(CPU, CONFIG, 2, tmp_path, candidates)
    assert first == ("matmul", "fastest of sdpa 4.00 ms, matmul 2.00 ms for windows of 128")
    assert fastest_for_windows(CPU, CONFIG, 2, tmp_path, candidates) == first
    assert called == 2
    answers = iter([0.001, 0.002])
    (tmp_path / CACHE_FILE).write_text('{"cut off')
    assert fastest_for_windows(CPU, CONFIG, 2, tmp_path, candidates)[0] == "sdpa"
    answers = iter([0.002, 0.001])
    assert fastest_for_windows(CPU, CONFIG, 4, tmp_path, candidates)[0] == "matmul"
    assert fastest_for_windows(CPU, CONFIG, 2, tmp_path, candidates)[0] == "sdpa"
