"""Share an evaluation's examples out over ranks, and add up what each of them found.

    with joined_ranks(runtime) as ranks:
        counts = torch.zeros(len(examples), dtype=torch.int64)
        for index in ranks.share(len(examples)): counts[index] = ...
        counts = ranks.sum(counts)      # everywhere the same

A rank fills in what it did and leaves zeros elsewhere; nothing but numbers is exchanged. One
process needs no group and makes none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from archerchat.errors import UsageError
from archerchat.runtime import Runtime

T = TypeVar("T")


def rank_share(count: int, rank: int, world_size: int) -> range:
    """Return which of `count` examples a rank takes: r, r + W, ...

    Every example has one rank, and no rank takes two more than another.
    """
    assert 0 <= rank < world_size
    return range(rank, count, world_size)


@dataclass(frozen=True)
class Ranks:
    """One rank among those that evaluate together."""

    rank: int = 0
    world_size: int = 1
    group: Any = None
    """Of torch.distributed, for tensors on the CPU; None for one process."""

    def share(self, count: int) -> range:
        """Return the examples that this rank takes."""
        return rank_share(count, self.rank, self.world_size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, which lie on the CPU."""
        if self.group is None:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def first_alone(self, work: Callable[[], T]) -> T:
        """Do `work` on the first rank, then on the others: what it downloads is there by then."""
        if self.group is None:
            return work()
        if self.rank > 0:
            dist.barrier(group=self.group)
        result = work()
        if self.rank == 0:
            dist.barrier(group=self.group)
        return result


@contextmanager
def joined_ranks(runtime: Runtime) -> Iterator[Ranks]:
    """Join torchrun's processes for the block; a group that is there already is used and kept."""
    if runtime.world_size == 1:
        yield Ranks()
        return
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo")
    try:
        yield Ranks(runtime.rank, runtime.world_size, dist.new_group(backend="gloo"))
    finally:
        if made:
            dist.destroy_process_group()


def require_one_rank(runtime: Runtime, what: str) -> None:
    """Refuse several ranks.

    Args:
        what: begins the sentence, such as "pretraining".

    Raises:
        UsageError: there are several.
    """
    if runtime.world_size > 1:
        raise UsageError(
            f"WORLD_SIZE is {runtime.world_size}, but {what} runs on one device so far: "
            "start it without torchrun"
        )
