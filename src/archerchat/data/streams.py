"""The batches of a run, which are the same on any number of ranks that resume it.

A run that begins on N ranks has N streams of micro-batches: stream s reads every Nth row group, or
conversation, from the sth on. A step takes the next A micro-batches of each stream, N * A in all.
On M ranks each takes an Mth of these, in order. So every step trains on the same rows even if the
number of ranks changes. A rank that shares a stream with others reads all of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from archerchat.checkpoint import Stateful
from archerchat.data.prefetch import Batch, PrefetchingLoader
from archerchat.distributed import Ranks
from archerchat.errors import UsageError

LoaderT = TypeVar("LoaderT", bound=PrefetchingLoader[Any])
COUNT = "streams"


def saved_streams(state: Mapping[str, Any]) -> int:
    return int(state.get(COUNT, 1))


class Streams(Stateful, Generic[LoaderT]):
    """Yield this rank's micro-batches of each step.

    Args:
        open_stream: opens stream s of N, given s and N.
        num_streams: N; a new run has one for each rank.
        grad_accum_steps: micro-batches of this rank per step.

    Raises:
        UsageError: a step's micro-batches cannot be divided evenly among the streams.
    """

    def __init__(
        self,
        open_stream: Callable[[int, int], LoaderT],
        num_streams: int,
        grad_accum_steps: int,
        ranks: Ranks,
    ) -> None:
        per_step = grad_accum_steps * ranks.world_size
        if per_step % num_streams:
            raise UsageError(
                f"the run began on {num_streams} ranks, which cannot divide a step of {per_step} "
                "micro-batches: resume with the --device-batch-size and the --total-batch-size "
                "that it began with"
            )
        self._ranks, self._num_streams = ranks, num_streams
        self._per_stream = per_step // num_streams
        first = ranks.rank * grad_accum_steps
        self._own = defaultdict[int, list[int]](list)
        """This rank's micro-batches of a step, as indices by stream."""
        for place in range(first, first + grad_accum_steps):
            self._own[place // self._per_stream].append(place % self._per_stream)
        self._turns = [(stream, place) for stream, places in self._own.items() for place in places]
        self._turn = 0
        """Index in `_turns` of the next micro-batch."""
        self.loaders = {stream: open_stream(stream, num_streams) for stream in self._own}
        """The streams that this rank reads."""

    @property
    def first(self) -> LoaderT:
        """The first stream that this rank reads."""
        return next(iter(self.loaders.values()))

    @property
    def own(self) -> list[LoaderT]:
        """The streams that no lower rank reads: over all ranks, each stream once."""
        return [self.loaders[stream] for stream, places in self._own.items() if places[0] == 0]

    def __next__(self) -> Batch:
        """Return this rank's next micro-batch; skip those of other ranks, before and after.

        After an error the turn stays, so that the loader raises it again.
        """
        stream, place = self._turns[self._turn]
        loader, places = self.loaders[stream], self._own[stream]
        if place == places[0]:
            _skip(loader, place)
        batch = next(loader)
        if place == places[-1]:
            _skip(loader, self._per_stream - 1 - place)  # before the step's state is read
        self._turn = (self._turn + 1) % len(self._turns)
        return batch

    def _prefix(self, stream: int) -> str:
        return "" if self._num_streams == 1 else f"{stream}/"

    def state_dict(self) -> dict[str, Any]:
        """Return every stream's state; all ranks call this between two steps."""
        own = {
            self._prefix(stream) + key: value.numpy() if isinstance(value, Tensor) else value
            for stream, loader in self.loaders.items()
            for key, value in loader.state_dict().items()
        }
        whole: dict[str, Any] = {}
        for state in self._ranks.gather(own):
            for key, value in state.items():
                whole[key] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        return whole if self._num_streams == 1 else {COUNT: self._num_streams, **whole}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned on any number of ranks.

        Raises:
            CheckpointError: it does not fit the loaders.
        """
        assert saved_streams(state) == self._num_streams
        self._turn = 0
        for stream, loader in self.loaders.items():
            prefix = self._prefix(stream)
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            loader.load_state_dict(own)

    def close(self) -> None:
        for loader in self.loaders.values():
            loader.close()


def _skip(loader: Iterator[Batch], count: int) -> None:
    next(islice(loader, count, count), None)
