"""A process's place among the ranks, its share of the examples, and sums over the ranks."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from archerchat.distributed import Place, Ranks, _new_store, joined_ranks, read_place
from archerchat.errors import UsageError
from archerchat.runtime import build_runtime


@pytest.mark.parametrize("count", [0, 1, 5, 16, 1319])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_example_has_one_rank(count: int, world_size: int) -> None:
    places = [Place(rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [place.share(count) for place in places]
    assert sorted(index for share in shares for index in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_needs_no_group() -> None:
    with joined_ranks(build_runtime("cpu", "float32")) as ranks:
        assert ranks == Ranks()
        assert list(ranks.share(3)) == [0, 1, 2]
        counts = torch.tensor([1, 2])
        assert ranks.sum(counts) is counts
        assert ranks.first_alone(lambda: "done") == "done"
    assert not torch.distributed.is_initialized()


def test_ranks_come_from_torchrun() -> None:
    assert read_place({}) == Place(rank=0, local_rank=0, world_size=1)
    place = read_place({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"})
    assert place == Place(rank=5, local_rank=1, world_size=8)
    assert not place.is_master


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0"},
        {"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "8"},
        {"RANK": "one", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "0", "LOCAL_RANK": "-1", "WORLD_SIZE": "2"},
    ],
)
def test_broken_ranks_are_named(environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=f"RANK='{environment['RANK']}'.*torchrun"):
        read_place(environment)


@pytest.mark.parametrize("late", [0, 2])
def test_a_restart_does_not_read_what_ranks_that_ended_left_in_the_store(late: int) -> None:
    """torchrun keeps its store when it restarts the ranks."""
    store, parts = dist.HashStore(), []

    def start(rank: int, number: int) -> None:
        time.sleep(0.1 * (rank == late))  # the others find what the last start left
        part = _new_store(store, Place(rank=rank, world_size=3))
        part.set(f"address of {rank}", str(number))
        read = [part.get(f"address of {other}").decode() for other in range(3)]
        parts.append((number, read))

    for number in range(3):
        threads = [threading.Thread(target=start, args=(rank, number)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert parts == [(number, [str(number)] * 3) for number in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
