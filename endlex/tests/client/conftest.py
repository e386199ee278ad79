"""Shared by the client's tests: an environment without a server."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the developer's shell says, tests reach only the servers that they start."""
    for name in [*os.environ]:
        if name.startswith("ENDLEX_") or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
