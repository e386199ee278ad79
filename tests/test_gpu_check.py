"""The check on a card runs whole on a CPU: every part, its table and its one JSON object."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("benchmarks/gpu.sh", "benchmarks/gpu_bundle.sh")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_are_valid(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script of the benchmarks as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.slow
def test_nothing_that_a_bare_machine_lacks_is_imported() -> None:
    """What `benchmarks/gpu_bundle.sh` leaves out: Parquet, reports, the dashboard."""
    code = """
import importlib, sys
for name in ("pyarrow", "matplotlib", "scipy", "fastapi", "psutil"):
    sys.modules[name] = None
sys.path.insert(0, "benchmarks")
for name in ("check", "common", "decode", "learning", "speed"):
    importlib.import_module(f"gpu_{name}")
import archerchat.commands.doctor
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_row_that_fails_ends_the_process_and_the_rest_runs_in_the_next(
    load: Any, tmp_path: Path
) -> None:
    rows = load("gpu_common").Rows(tmp_path / "rows", math.inf)
    rows.measure("first", lambda: {"value": 1})
    with pytest.raises(SystemExit):
        rows.measure("second", lambda: {"value": 1 // 0})
    rows.measure("second", lambda: pytest.fail("it had its turn"))
    rows.measure("third", lambda: {"value": 3})
    found = rows.read()
    assert (found["first"]["value"], found["third"]["value"]) == (1, 3)
    assert found["second"] == {"error": "ZeroDivisionError: integer division or modulo by zero"}
    late = load("gpu_common").Rows(tmp_path / "late", time.time() - 1)
    late.measure("first", lambda: pytest.fail("there is no time left"))
    assert late.read() == {"first": {"error": "no time left"}}


def test_a_part_that_fails_leaves_its_last_lines(load: Any, tmp_path: Path) -> None:
    check = load("gpu_check")
    (tmp_path / "log.txt").write_text("of an earlier part\n")
    part = check.Part("broken", 60, "no_such_script.py")
    result = check.run_part(part, tmp_path, time.time() + 60)
    assert result["status"] == "failed (2)"
    assert "no_such_script.py" in result["last_lines"][-1]
    assert "of an earlier part" not in result["last_lines"]
    bars = check.judge({"broken": {**result, "seconds": 1}})
    assert [bar["met"] for bar in bars.values()] == [False] * 6


def test_tests_are_counted_where_pytest_was_stopped(load: Any) -> None:
    lines = [
        "tests/a/test_b.py::test_c[cpu-x] PASSED    [ 50%]",
        "[gw3] [ 60%] PASSED tests/a/test_b.py::test_d",
        "tests/a/test_b.py::test_e",
        "[gw1] [ 70%] FAILED tests/a/test_b.py::test_e[cuda]",
        "FAILED tests/a/test_b.py::test_e[cuda] - AssertionError",
    ]
    assert load("gpu_check").count_tests(lines) == {"passed": 2, "failed": 1}


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
