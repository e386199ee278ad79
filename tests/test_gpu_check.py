"""The check on a card runs whole on a CPU: every part, its table and its one JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("benchmarks/gpu.sh", "benchmarks/gpu_bundle.sh")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_are_valid(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.slow
def test_the_rehearsal_runs_whole(tmp_path: Path) -> None:
    environment = os.environ | {
        "ARCHERCHAT_GPU_DRY_RUN": "1",
        "ARCHERCHAT_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
        "OUT": str(tmp_path / "out"),
        "PYTHON": sys.executable,
    }
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu.sh"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(result["parts"]) == ["machine", "tests", "speed", "anatomy", "decode", "learning"]
    assert result["failed"] == []
    assert "choices" in result["doctor"]
    parts = {name: part["rows"] for name, part in result["parts"].items()}
    assert parts["tests"]["pytest"]["passed"] > 0
    assert {"d12 full sdpa", "d12 windows flex", "d20 windows best"} <= parts["speed"].keys()
    assert all(row["tokens_per_second"] > 0 for row in parts["speed"].values())
    assert all(row["tokens_per_second"] > 0 for row in parts["decode"].values())
    assert len(result["bars"]) == 6
    kept = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(kept) <= 8  # what a lent machine gives back
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    assert "speed: ok" in (tmp_path / "out" / "table.txt").read_text()
