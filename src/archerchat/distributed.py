"""Ranks: this process's place among torchrun's, its share of the work, and sums over all of them.

    with joined_ranks(runtime) as ranks:
        counts = torch.zeros(len(examples), dtype=torch.int64)
        for index in ranks.share(len(examples)): counts[index] = ...
        counts = ranks.sum(counts)      # everywhere the same

A rank fills in what it did and leaves zeros elsewhere; only numbers are exchanged. Nothing else
reads torchrun's variables or builds a process group. One process needs no group and makes none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from archerchat.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process's place among those that run together."""

    rank: int = 0
    local_rank: int = 0
    """Rank on this machine, which picks its device."""
    world_size: int = 1

    @property
    def is_master(self) -> bool:
        """Whether this rank prints, evaluates alone, and writes files."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return which of `count` examples this rank takes: r, r + W, ...

        Every example has one rank, and no rank takes two more than another.
        """
        return range(self.rank, count, self.world_size)


def read_place(environment: Mapping[str, str]) -> Place:
    """Return the place that torchrun set in the environment; one process without torchrun.

    Raises:
        UsageError: torchrun's variables are incomplete, not numbers, or contradict each other.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = {name: environment[name] for name in names if environment.get(name)}
    if not given:
        return Place()
    try:
        rank, local_rank, world_size = (int(given[name]) for name in names)
    except (KeyError, ValueError):
        rank, local_rank, world_size = -1, -1, -1
    if not (0 <= rank < world_size and 0 <= local_rank < world_size):
        found = ", ".join(f"{name}={environment.get(name, '')!r}" for name in names)
        raise UsageError(
            f"the environment has {found}, which torchrun does not set: start with torchrun, or "
            "unset all three for one process"
        )
    return Place(rank=rank, local_rank=local_rank, world_size=world_size)


@dataclass(frozen=True)
class Ranks(Place):
    """A place whose process can talk to the others."""

    group: Any = None
    """Group of torch.distributed for tensors on the CPU; None for one process."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, which are on the CPU."""
        if self.group is None:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def first_alone(self, work: Callable[[], T]) -> T:
        """Do `work` on the first rank, then on the others, which find what it downloaded."""
        if self.group is None:
            return work()
        if self.rank > 0:
            dist.barrier(group=self.group)
        result = work()
        if self.rank == 0:
            dist.barrier(group=self.group)
        return result


@contextmanager
def joined_ranks(place: Place) -> Iterator[Ranks]:
    """Join torchrun's processes for the block; an existing group is used and kept.

    Args:
        place: this process's, such as its `Runtime`.
    """
    if place.world_size == 1:
        yield Ranks()
        return
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo")
    try:
        yield Ranks(
            rank=place.rank,
            local_rank=place.local_rank,
            world_size=place.world_size,
            group=dist.new_group(backend="gloo"),
        )
    finally:
        if made:
            dist.destroy_process_group()


def require_one_rank(place: Place, what: str) -> None:
    """Refuse several ranks.

    Args:
        what: begins the sentence, such as "pretraining".

    Raises:
        UsageError: there are several.
    """
    if place.world_size > 1:
        raise UsageError(
            f"WORLD_SIZE is {place.world_size}, but {what} runs on one device so far: "
            "start it without torchrun"
        )
