"""The batches of a run do not depend on how many ranks it is resumed on."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from archerchat.data.prefetch import Batch, PrefetchingLoader, State, Streams, saved_streams
from archerchat.distributed import Ranks
from archerchat.errors import DataError, UsageError


@dataclass(frozen=True)
class Next:
    number: int


class Numbers(PrefetchingLoader[Next]):
    """Count in steps: stream s of n yields s, s + n, ..."""

    def __init__(self, stream: int, count: int) -> None:
        identity = {"batch_size": 1, "sequence_length": 1, "stream": stream, "count": count}
        super().__init__(identity, Next(stream), 2, np.uint16)

    def _iter_after(self, state: State[Next]) -> Iterator[tuple[Batch, State[Next]]]:
        step = self._identity["count"]
        numbers = itertools.count(state.progress.number, step)
        return ((Batch(np.full((2, 1, 1), n)), State(Next(n + step))) for n in numbers)

    def _parse(self, state: Mapping[str, Any]) -> Next:
        return Next(int(state["number"]))


class Alone(Ranks):
    """A rank that hears of the others' states through a list."""

    def gather(self, value: Any) -> list[Any]:
        heard.append(value)
        return heard


heard: list[Any] = []


def steps(world_size: int, streams: int, count: int, state: Any = None) -> tuple[list[Any], Any]:
    """Return what all ranks read in each step of 12 micro-batches, and the state after them."""
    read = [Counter[int]() for _ in range(count)]
    heard.clear()
    ended: Any = None
    for rank in range(world_size):
        ranks = Alone(rank=rank, world_size=world_size)
        loader = Streams(Numbers, streams, 12 // world_size, ranks)
        if state is not None:
            loader.load_state_dict(state)
        for step in range(count):
            read[step].update(next(loader).inputs.item() for _ in range(12 // world_size))
        ended = loader.state_dict()
        loader.close()
    return read, ended


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 6, 12])
def test_ranks_may_come_and_go(before: int, after: int) -> None:
    expected, _ = steps(before, before, 5)
    first, state = steps(before, before, 2)
    assert saved_streams(state) == before
    second, _ = steps(after, before, 3, state)
    assert first + second == expected
    read = sum(expected, Counter[int]())
    assert read == Counter(range(60))  # each once, none left out


class Broken(Numbers):
    """Stream 1 ends with an error after two batches; stream 0 never does."""

    def _iter_after(self, state: State[Next]) -> Iterator[tuple[Batch, State[Next]]]:
        yield from itertools.islice(super()._iter_after(state), 2 if state.progress.number else 99)
        raise DataError("broken shard")


def test_an_error_is_raised_again() -> None:
    loader = Streams(Broken, 2, 6, Ranks())
    assert [next(loader).inputs.item() for _ in range(5)] == [0, 2, 4, 1, 3]
    for _ in range(3):
        with pytest.raises(DataError, match="broken shard"):
            next(loader)
    loader.close()


def test_a_stream_that_ranks_share_is_counted_once() -> None:
    shared = [Streams(Numbers, 2, 3, Ranks(rank=rank, world_size=4)) for rank in range(4)]
    assert [len(loader.loaders) for loader in shared] == [1, 1, 1, 1]
    assert [len(loader.own) for loader in shared] == [1, 0, 1, 0]


def test_a_step_that_the_streams_cannot_share_is_refused() -> None:
    with pytest.raises(UsageError, match=r"began on 5 ranks.*6 micro-batches"):
        Streams(Numbers, 5, 6, Ranks())
