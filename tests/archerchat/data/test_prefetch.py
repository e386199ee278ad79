"""The background thread: ahead but bounded, honest about errors, and gone when asked."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import pytest

from archerchat.data.prefetch import Batch, PrefetchingLoader, State


@dataclass(frozen=True)
class Last:
    number: int


class Numbers(PrefetchingLoader[Last]):
    """Yield the numbers of a source."""

    def __init__(self, source: Callable[[], Iterator[int]], prefetch: int) -> None:
        super().__init__({"batch_size": 1, "sequence_length": 1}, Last(-1), prefetch, np.uint16)
        self._source = source

    def _iter_after(self, state: State[Last]) -> Iterator[tuple[Batch, State[Last]]]:
        return ((Batch(np.full((2, 1, 1), n)), State(Last(n))) for n in self._source())

    def _parse(self, state: Mapping[str, Any]) -> Last:
        return Last(state["number"])


def numbers_of(loader: Numbers) -> list[int]:
    return [int(batch.inputs[0, 0]) for batch in loader]


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited 20 s in vain"
        time.sleep(0.001)


def test_yields_the_source_in_order_then_stops() -> None:
    with Numbers(lambda: iter(range(20)), 3) as loader:
        assert numbers_of(loader) == list(range(20))
        with pytest.raises(StopIteration):
            next(loader)
        assert loader.state_dict()["number"] == 19


def test_runs_ahead_but_not_beyond_its_depth() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for number in count():
            made.append(number)
            yield number

    with Numbers(source, 3) as loader:
        next(loader)
        wait_until(lambda: len(made) == 4)
        time.sleep(0.05)
        assert len(made) == 4
        assert loader.state_dict()["number"] == 0


def test_an_error_comes_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("broken shard")

    with Numbers(source, 5) as loader:
        assert next(loader).inputs.tolist() == [[1]]
        for _ in range(2):
            with pytest.raises(ValueError, match="broken shard"):
                next(loader)


def test_close_ends_the_thread_even_when_the_queue_is_full() -> None:
    loader = Numbers(count, 2)
    next(loader)
    loader.close()
    loader.close()
    assert not prefetch_threads()


def test_the_thread_ends_when_nobody_refers_to_the_loader() -> None:
    loader = Numbers(count, 2)
    next(loader)
    reference = weakref.ref(loader)
    del loader
    assert reference() is None
    wait_until(lambda: not prefetch_threads())
