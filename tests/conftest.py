"""Fixtures shared by all tests: the development data beside the checkout, if it is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("ARCHERCHAT_SHARED") or Path(__file__).resolve().parents[2] / "shared")


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs of the tests do not enter the user's list of run directories."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def oracle_dir() -> Path:
    """The reference's goldens; skips where the checkout has no `../shared`."""
    return _directory(SHARED / "oracle")


@pytest.fixture(scope="session")
def shared_data_dir() -> Path:
    """The real development data; skips where the checkout has no `../shared`."""
    return _directory(SHARED / "data")


def _directory(path: Path) -> Path:
    if not path.is_dir():
        pytest.skip(f"no {path.parent.name}/{path.name} beside the checkout")
    return path
