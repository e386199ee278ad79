"""The background thread: ahead but bounded, honest about errors, and gone when asked."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from archerchat.data.prefetch import Prefetcher


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "waited 5 s in vain"
        time.sleep(0.001)


def test_yields_the_source_in_order_then_stops() -> None:
    prefetcher = Prefetcher(iter(range(20)), depth=3)
    assert list(prefetcher) == list(range(20))
    with pytest.raises(StopIteration):
        next(prefetcher)


def test_runs_ahead_but_not_beyond_its_depth() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for i in count():
            made.append(i)
            yield i

    prefetcher = Prefetcher(source(), depth=3)
    wait_until(lambda: len(made) == 3)
    time.sleep(0.05)
    assert len(made) == 3
    next(prefetcher)
    wait_until(lambda: len(made) == 4)
    prefetcher.close()


def test_an_error_comes_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("broken shard")

    prefetcher = Prefetcher(source(), depth=5)
    assert next(prefetcher) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="broken shard"):
            next(prefetcher)


def test_counts_the_seconds_that_next_waits() -> None:
    made = []

    def slow() -> Iterator[int]:
        while True:
            time.sleep(0.3)
            made.append(0)
            yield 0

    prefetcher = Prefetcher(slow(), depth=1)
    next(prefetcher)
    next(prefetcher)
    waited = prefetcher.wait_seconds
    assert 0.3 < waited < 60
    while len(made) < 3:  # the third is in the queue by then
        time.sleep(0.01)
    next(prefetcher)
    assert prefetcher.wait_seconds - waited < 0.3
    prefetcher.close()


def test_close_ends_the_thread_even_when_the_queue_is_full() -> None:
    prefetcher = Prefetcher(count(), depth=2)
    next(prefetcher)
    began = time.monotonic()
    prefetcher.close()
    prefetcher.close()
    assert time.monotonic() - began < 30
    assert not prefetch_threads()
    with pytest.raises(StopIteration):
        next(prefetcher)


def test_the_thread_ends_when_nobody_refers_to_it() -> None:
    prefetcher = Prefetcher(count(), depth=2)
    next(prefetcher)
    reference = weakref.ref(prefetcher)
    del prefetcher
    gc.collect()
    assert reference() is None
    assert not prefetch_threads()


@pytest.mark.parametrize("depth", [1, 1000])
def test_an_interpreter_that_leaves_does_not_hang(depth: int) -> None:
    program = (
        "from itertools import count\n"
        "from archerchat.data.prefetch import Prefetcher\n"
        f"prefetcher = Prefetcher(count(), {depth})\n"
        "print(next(prefetcher))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
