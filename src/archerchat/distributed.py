"""Ranks: this process's place among torchrun's, its share of the work, and exchanges with others.

    with joined_ranks(runtime) as ranks:
        counts = torch.zeros(len(examples), dtype=torch.int64)
        for index in ranks.share(len(examples)): counts[index] = ...
        counts = ranks.sum(counts)      # everywhere the same

A rank fills in what it did and leaves zeros elsewhere. Nothing else reads torchrun's variables or
builds a process group. One process needs no group and makes none.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from archerchat.errors import UsageError

T = TypeVar("T")
ARRIVAL_TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for the last of them to start."""
WORKING_TIMEOUT = timedelta(hours=2)
"""How long ranks wait for one that works alone, such as for a download."""
# torch 2.13 renamed them.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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
        """Return this rank's share of `count` examples: r, r + W, ..."""
        return range(self.rank, count, self.world_size)


def read_place(environment: Mapping[str, str]) -> Place:
    """Return the place that torchrun set in the environment; without torchrun, a single process.

    Raises:
        UsageError: torchrun's variables are incomplete, not numbers, or contradict each other.
    """
    given = {name: environment.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if not any(given.values()):
        return Place()
    rank, local_rank, world_size = (int(v) if v.isdecimal() else -1 for v in given.values())
    if not (0 <= rank < world_size and 0 <= local_rank < world_size):
        found = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise UsageError(
            f"the environment has {found}, which torchrun does not set: start with torchrun, or "
            "unset all three for one process"
        )
    return Place(rank=rank, local_rank=local_rank, world_size=world_size)


def await_turn(rank: str, seconds: float = 3.0) -> str:
    """Wait so that lower ranks report an error first; return the prefix of this rank's report.

    Ranks often fail together. When the lowest one has reported and ended, torchrun ends the others
    while they wait here.
    """
    number = int(rank) if rank.isdecimal() else 0
    time.sleep(seconds * min(number, 10))
    return f"rank {number}: " if number else ""


@dataclass
class Collective:
    """An exchange between the ranks that is in progress.

    It keeps its tensors alive until `wait`: freed memory would be reused while it is still read.
    """

    work: Any
    sent: Tensor | None
    received: Tensor

    def wait(self) -> Tensor:
        """Return the received tensor; the sent one may be overwritten from now on."""
        if self.work is not None:
            self.work.wait()
        self.work = self.sent = None
        return self.received


@dataclass(frozen=True)
class Ranks(Place):
    """A place whose process can exchange data with the others.

    Every rank must call the same methods in the same order, or all of them wait.
    """

    joined: bool = False
    """Whether torch's default group connects the ranks. The group itself is not held here, because
    it has to end with `joined_ranks`, before the interpreter."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, which are on the CPU."""
        if not self.joined:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return which of the flags are set on some rank."""
        if not self.joined:
            return flags
        return tuple(self.sum(torch.tensor(flags, dtype=torch.int64)).gt(0).tolist())

    def mean(self, *values: float) -> tuple[float, ...]:
        """Return the mean of each value over the ranks, the same everywhere."""
        if not self.joined:
            return values
        total = self.sum(torch.tensor(values, dtype=torch.float64)) / self.world_size
        return tuple(total.tolist())

    def gather(self, value: Any) -> list[Any]:
        """Return each rank's value, in order. Values are plain ones or NumPy arrays, not tensors.

        They are pickled between the processes of this job, like torchrun's own messages.
        """
        if not self.joined:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def start_sum(self, tensor: Tensor) -> Collective:
        """Start summing the ranks' tensors of one shape in place."""
        work = dist.all_reduce(tensor, async_op=True) if self.joined else None
        return Collective(work, None, tensor)

    def start_reduce_scatter(self, tensor: Tensor) -> Collective:
        """Start summing the ranks' tensors (W * n, ...); each rank receives its n rows."""
        if not self.joined:
            return Collective(None, None, tensor)
        own = tensor.new_empty(tensor.size(0) // self.world_size, *tensor.shape[1:])
        work = _reduce_scatter(own, tensor, async_op=True)
        return Collective(work, tensor, own)

    def start_gather(self, own: Tensor) -> Collective:
        """Start collecting the ranks' rows (n, ...) into (W * n, ...) on each."""
        if not self.joined:
            return Collective(None, None, own)
        own = own.contiguous()
        whole = own.new_empty(own.size(0) * self.world_size, *own.shape[1:])
        work = _all_gather(whole, own, async_op=True)
        return Collective(work, own, whole)

    def first_alone(self, work: Callable[[], T]) -> T:
        """Do `work` on the first rank, then on the others, which find its downloads."""
        if self.rank > 0:
            self.sum(torch.zeros(1))
        result = work()
        if self.rank == 0:
            self.sum(torch.zeros(1))
        return result


def _new_store(store: Any, place: Place) -> Any:
    """Wait for all ranks; return a part of torchrun's store that no earlier start has used.

    With `--max-restarts` the store outlives the ranks, and a rank that reads the address of an
    ended rank never connects. So each rank writes a random word, and rank 0 publishes the list of
    words until every rank has confirmed a list with its own word.
    """
    word, deadline = uuid.uuid4().hex, time.monotonic() + ARRIVAL_TIMEOUT.total_seconds()

    def read(key: str) -> str:
        return str(store.get(key).decode())  # waits for the first value

    store.set(f"confirmed by {place.rank}", "")
    store.set(f"word of {place.rank}", word)
    if place.rank == 0:
        store.set("agreed", "")
    others = range(1, place.world_size)
    while time.monotonic() < deadline:
        if place.rank == 0:
            words = " ".join(read(f"word of {rank}") for rank in range(place.world_size))
            store.set("words", words)
            if all(read(f"confirmed by {rank}") == words for rank in others):
                store.set("agreed", words)
                return dist.PrefixStore(word, store)  # type: ignore[attr-defined]
        elif word in (words := read("words")).split():
            store.set(f"confirmed by {place.rank}", words)
            if read("agreed") == words:
                first = words.split()[0]
                return dist.PrefixStore(first, store)  # type: ignore[attr-defined]
        time.sleep(0.02)
    raise RuntimeError(f"not all of {place.world_size} ranks started within {ARRIVAL_TIMEOUT}")


@contextmanager
def joined_ranks(place: Place, device: torch.device | None = None) -> Iterator[Ranks]:
    """Join torchrun's processes for the block.

    An existing process group is used and kept; it must support tensors on the CPU too.

    Args:
        device: of the tensors that the `start_` methods get; NCCL moves those on CUDA.
    """
    if place.world_size == 1:
        yield Ranks()
        return
    made = not dist.is_initialized()
    if made:
        on_cuda = device is not None and device.type == "cuda"
        store, _, _ = next(rendezvous("env://", timeout=ARRIVAL_TIMEOUT))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=_new_store(store, place),
            rank=place.rank,
            world_size=place.world_size,
            timeout=ARRIVAL_TIMEOUT,
        )
        _set_pg_timeout(WORKING_TIMEOUT)
    try:
        ranks = Ranks(
            rank=place.rank, local_rank=place.local_rank, world_size=place.world_size, joined=True
        )
        yield ranks
        if made:
            ranks.any(False)  # nobody closes connections that another still reads
    finally:
        if made:
            dist.destroy_process_group()
