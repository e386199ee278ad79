"""The loader's benchmark runs and ends with the figures it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "loader.py"


@pytest.mark.slow
@pytest.mark.parametrize(("required", "status"), [(1, 0), (1e9, 1)])
def test_the_last_line_is_json(required: float, status: int, oracle_dir: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, BENCHMARK, "--seconds", "0.2", "--required-ratio", str(required)),
            *("--data", oracle_dir / "corpus", "--tokenizer", oracle_dir / "tokenizer"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    slowest = min(row["tokens_per_second"] for row in figures["packings"].values())
    assert figures["tokens_per_second"] == slowest > 0
    assert figures["ratio_to_step"] == slowest / 21_500
