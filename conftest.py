"""What all tests share: the package `endlex`, and properties that no machine is too slow for."""

import gc
import os

import pytest
from hypothesis import HealthCheck, settings

import endlex  # noqa: F401  (before pytest calls its tests `endlex.tests`, which would hide it)

settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """Keep the garbage collector out of what was imported: looking through it takes 0.2 s."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long tests where workers share them out, or one ends long after the others.

    Those outside the packages' folders run whole programs, and are the longest.
    """
    if os.environ.get("PYTEST_XDIST_WORKER"):
        depth = {item: len(item.path.relative_to(item.config.rootpath).parts) for item in items}
        items.sort(key=lambda item: (item.get_closest_marker("slow") is None, depth[item]))
