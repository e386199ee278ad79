"""What all tests share: the package `endlex`, and properties that no machine is too slow for."""

import gc
import os
from itertools import islice

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


@pytest.hookimpl(trylast=True)  # after the tests that nobody asked for are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let every worker begin with its share of the long tests, or one ends long after the others.

    Each gets a stretch of the list. The longest tests, outside the packages' folders, run whole
    programs. The others stay in their order, since those of a file share what they set up.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        depth = {item: len(item.path.relative_to(item.config.rootpath).parts) for item in items}
        items.sort(key=lambda item: (item.get_closest_marker("slow") is None, depth[item]))
        slow = [item for item in items if item.get_closest_marker("slow")]
        others = iter(items[len(slow) :])
        ordered = []
        for worker in range(workers):
            share = slow[worker::workers]
            ordered += [*share, *islice(others, max(0, len(items) // workers - len(share)))]
        items[:] = [*ordered, *others]
