"""The engine's benchmark runs and ends with the figures it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "engine.py"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_last_line_is_json(dtype: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, BENCHMARK, "--depth", "2", "--requests", "3", "--tokens", "4"),
            *("--rounds", "1", "--batch-rounds", "1", "--vocab-size", "300", "--no-compile"),
            *("--dtype", dtype, "--device", "cpu", "--max-seq-len", "128"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert all(figures[n] > 0 for n in ("batched_ratio", "single_stream_ratio"))
    assert figures["tokens_per_second"] > 0
    assert figures["same_answers"] or dtype == "bfloat16"
    assert figures["dtype"] == dtype
