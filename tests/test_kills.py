"""kill -9 at random moments loses nothing of a model: a short form of `benchmarks/kills.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "kills.py"


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_checkpoints_that_load() -> None:
    command = [sys.executable, str(SCRIPT), "checkpoints", "--kills", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"checkpoints": {"kills": 12, "lost": 0}}
