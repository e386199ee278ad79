"""The fault tests' modules are plain files beside them, which the benchmark imports too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    """Kill what a failed test has left running."""
    from fault_processes import stop_all

    yield
    stop_all()
