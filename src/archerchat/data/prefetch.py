"""Batches that are ready when a step needs them, and the same on any number of ranks.

The loaders of text and of conversations share a base, whose background thread reads, tokenizes and
packs. Every batch comes with the state after it, and a checkpoint saves the state of the last batch
that the caller got. A state is a tuple of references; tensors are made of it only for a checkpoint.

A run that begins on N ranks has N streams of micro-batches: stream s reads every Nth row group, or
conversation, from the sth on. A step takes the next A micro-batches of each stream, N * A in all.
On M ranks each takes an Mth of these, in order. So every step trains on the same rows even if the
number of ranks changes. A rank that shares a stream with others reads all of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from archerchat.checkpoint import Stateful
from archerchat.config import compare_configs
from archerchat.data.packing import Buffered, Row, join_documents, split_documents
from archerchat.distributed import Ranks
from archerchat.errors import CheckpointError, UsageError

ProgressT = TypeVar("ProgressT")
COUNT = "streams"
"""The key of a state with several streams under which it has their number."""


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of T token ids, and the ids to predict, -1 where there is none."""

    stacked: NDArray[np.int64]
    """(2, B, T): one contiguous array, so that one copy moves both halves to a device."""

    @property
    def inputs(self) -> NDArray[np.int64]:
        """(B, T), contiguous; a view."""
        return np.asarray(self.stacked[0])

    @property
    def targets(self) -> NDArray[np.int64]:
        """(B, T), contiguous; a view."""
        return np.asarray(self.stacked[1])


@dataclass(frozen=True, eq=False)
class State(Generic[ProgressT]):
    """Together with a loader's identity, this decides the batches that follow."""

    progress: ProgressT
    """A dataclass of JSON values."""
    documents: tuple[Buffered, ...] = ()
    """Documents in the packer's buffer, in the buffer's order."""


class PrefetchingLoader(Iterator[Batch], Generic[ProgressT]):
    """Iterate over batches that a thread prepares, from the first `next` until `close`.

    Args:
        identity: JSON that decides which batches are yielded, `batch_size` and `sequence_length`
            included.
        progress: position of a new loader.
        prefetch: number of batches to prepare ahead.
        dtype: type of the state's tokens if no document is buffered.
    """

    def __init__(
        self, identity: Mapping[str, Any], progress: ProgressT, prefetch: int, dtype: DTypeLike
    ) -> None:
        self._identity, self._prefetch, self._dtype = identity, prefetch, dtype
        self._state = State(progress)
        self._pool: ThreadPoolExecutor | None = None
        self._pending = deque[Future[tuple[Batch, State[ProgressT]]]]()

    @abstractmethod
    def _iter_after(self, state: State[ProgressT]) -> Iterator[tuple[Batch, State[ProgressT]]]:
        """Yield each batch after `state` with the state after it.

        `self` is the thread's own copy of the loader; the caller's never sees what it assigns.
        """

    @abstractmethod
    def _parse(self, state: Mapping[str, Any]) -> ProgressT:
        """Read a saved progress; a broken one is a KeyError, TypeError or ValueError."""

    def state_dict(self) -> dict[str, Any]:
        """Return the identity and the progress as JSON, and the buffered documents as tensors."""
        progress: Any = self._state.progress
        documents = join_documents(self._state.documents, self._dtype)
        return {"identity": dict(self._identity), **asdict(progress), **documents}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the row after the saved batch; batches may have another size.

        Raises:
            CheckpointError: the state is broken, or this loader would not yield the same rows.
        """
        try:
            saved = dict(state["identity"])
            documents = split_documents(state, saved["sequence_length"] + 1)
            loaded = State(self._parse(state), documents)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the saved state of the data loader is broken ({error!r}): resume from an "
                "earlier checkpoint"
            ) from error
        saved["batch_size"] = self._identity["batch_size"]
        saved, identity = self._reconcile(saved)
        if differences := compare_configs(saved, identity):
            raise CheckpointError(
                f"the data loader cannot resume: {'; '.join(differences)}. Restore the old "
                "settings or data, or start a new run"
            )
        self.close()
        self._identity, self._state = identity, loaded

    def _reconcile(self, saved: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """Return the saved identity without what may differ, and the identity to continue with."""
        return saved, self._identity

    def __next__(self) -> Batch:
        if self._pool is None:
            # The thread uses a copy, so that it does not keep a forgotten loader alive.
            self._batches = copy(self)._iter_after(self._state)
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
            for _ in range(self._prefetch):
                self._pending.append(self._pool.submit(next, self._batches))
        batch, self._state = self._pending[0].result()  # an error stays first, to be raised again
        self._pending.popleft()
        self._pending.append(self._pool.submit(next, self._batches))
        return batch

    def close(self) -> None:
        """Stop the background thread; a later `next` restarts it."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            self._pending.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def stack_rows(rows: Iterator[Row], batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Yield the rows in arrays (B, T + 1); an incomplete last one is dropped."""
    while len(taken := list(islice(rows, batch_size))) == batch_size:
        yield np.stack(taken)


LoaderT = TypeVar("LoaderT", bound=PrefetchingLoader[Any])


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
