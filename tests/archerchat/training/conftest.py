"""What the tests of whole training runs share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def launch() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Start `archerchat` in a process and thread of its own; none outlives the test."""
    children = []

    def start(words: list[str]) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-m", "archerchat.cli", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()
