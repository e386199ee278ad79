"""How the benchmarks measure: in a process of its own, the device waited for, by percentiles."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def run_in_child(script: str, arguments: Sequence[object]) -> dict[str, Any]:
    """Run a script and return its last line, one JSON object.

    Memory figures and compiled code are then of one run only.

    Raises:
        subprocess.CalledProcessError: it failed; its errors are on stderr.
    """
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def timed(synchronize: Callable[[], None], work: Callable[[], T]) -> tuple[float, T]:
    """Return how many seconds `work` took on the device too, and what it returned."""
    synchronize()
    started = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - started, result


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` (0 to 1) of all lie; the largest at the most."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
