"""Run an iterator ahead of its consumer, in a background thread with a bounded queue.

`Prefetcher` is the thread. `PrefetchingLoader` is what the loaders of text and of conversations
share: batches that travel with the state after them. A checkpoint's state is therefore that of the
last batch that the caller got, however far the thread has run ahead.
"""

from __future__ import annotations

import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from archerchat.checkpoint import compare_configs
from archerchat.errors import CheckpointError, UsageError

T = TypeVar("T")
BatchT = TypeVar("BatchT")
StateT = TypeVar("StateT")

_STOP_SECONDS = 5.0
"""How long to wait for a thread that is asked to stop. It is a daemon: exiting does not wait."""


class _Queue(Generic[T]):
    """What both threads share. The thread must not refer to `Prefetcher`, or it never dies."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.items: deque[T] = deque()
        self.changed = threading.Condition()
        self.stopped = False
        self.ended: BaseException | None = None


class Prefetcher(Generic[T]):
    """Iterate over `source`, whose next items a daemon thread prepares meanwhile.

    What `source` raises, `next` raises after the items before it. The thread ends with
    `close`, when this object is collected, or before the interpreter exits (a daemon thread
    inside compiled code could otherwise crash it then).

    Attributes:
        wait_seconds: how long `next` has waited, in all.
    """

    def __init__(self, source: Iterator[T], depth: int) -> None:
        self.wait_seconds = 0.0
        self._queue: _Queue[T] = _Queue(depth)
        thread = threading.Thread(
            target=_produce, args=(source, self._queue), name="prefetch", daemon=True
        )
        self._finalizer = weakref.finalize(self, _stop, self._queue, thread)
        thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        queue = self._queue
        began = time.perf_counter()
        with queue.changed:
            queue.changed.wait_for(lambda: queue.items or queue.ended)
            self.wait_seconds += time.perf_counter() - began
            if not queue.items:
                assert queue.ended is not None
                raise queue.ended
            item = queue.items.popleft()
            queue.changed.notify_all()
        return item

    def close(self) -> None:
        """Stop the thread; `next` then raises StopIteration. May be called again."""
        self._finalizer()


def _produce(source: Iterator[T], queue: _Queue[T]) -> None:
    ended: BaseException = StopIteration()
    try:
        for item in source:
            with queue.changed:
                queue.changed.wait_for(lambda: queue.stopped or len(queue.items) < queue.depth)
                if queue.stopped:
                    break
                queue.items.append(item)
                queue.changed.notify_all()
    except BaseException as error:
        ended = error
    with queue.changed:
        queue.ended = queue.ended or ended
        queue.changed.notify_all()


def _stop(queue: _Queue[T], thread: threading.Thread) -> None:
    with queue.changed:
        queue.stopped = True
        queue.items.clear()
        queue.ended = StopIteration()
        queue.changed.notify_all()
    if thread is not threading.current_thread():
        thread.join(_STOP_SECONDS)


@dataclass(frozen=True, eq=False)
class Batch:
    """Hold B rows of T token ids and, below them, the ids to predict, -1 where there are none."""

    stacked: NDArray[np.int64]
    """(2, B, T): one contiguous array, so that one copy moves both halves to a device."""

    @property
    def inputs(self) -> NDArray[np.int64]:
        """(B, T), contiguous; a view."""
        inputs: NDArray[np.int64] = self.stacked[0]
        return inputs

    @property
    def targets(self) -> NDArray[np.int64]:
        """(B, T), contiguous; a view."""
        targets: NDArray[np.int64] = self.stacked[1]
        return targets


class PrefetchingLoader(ABC, Generic[BatchT, StateT]):
    """Iterate over batches that a thread prepares; a checkpoint holds the state after the last one.

    The thread starts at the first `next` and stops with `close`.

    Args:
        state: before the first batch.
        depth: batches prepared ahead.
    """

    def __init__(self, state: StateT, depth: int) -> None:
        self._state, self._depth = state, depth
        self._prefetcher: Prefetcher[tuple[BatchT, StateT]] | None = None
        self._waited = 0.0

    @abstractmethod
    def _iter_after(self, state: StateT) -> Iterator[tuple[BatchT, StateT]]:
        """Yield each batch after `state` with the state after it.

        The iterator must not refer to the loader, or the loader is never collected.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what decides the batch after the last one returned: tensors and JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the batch after the saved one.

        Raises:
            CheckpointError: the state is broken, or this loader would not yield the same batches;
                the message says what differs.
        """
        try:
            identity, parsed = dict(state["identity"]), self._parse(state)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the saved state of the data loader is broken ({error!r}): resume from an "
                "earlier checkpoint"
            ) from error
        self._accept(identity)
        self.close()
        self._state = parsed

    @abstractmethod
    def _parse(self, state: Mapping[str, Any]) -> StateT:
        """Read what `state_dict` returned, except for the identity.

        Raises:
            KeyError, TypeError, ValueError: a part is missing or does not fit the others.
        """

    @abstractmethod
    def _accept(self, identity: Mapping[str, Any]) -> None:
        """Prepare to yield the batches of a saved identity.

        Raises:
            CheckpointError: this loader cannot.
        """

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> BatchT:
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._iter_after(self._state), self._depth)
        batch, self._state = next(self._prefetcher)
        return batch

    @property
    def wait_seconds(self) -> float:
        """How long `next` has waited for the background, in all."""
        return self._waited + (self._prefetcher.wait_seconds if self._prefetcher else 0.0)

    def close(self) -> None:
        """Stop the background thread; a later `next` starts it again where it was."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._waited = self.wait_seconds
            self._prefetcher = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_sizes(rank: int, world_size: int, **sizes: int) -> None:
    """Refuse what no loader can be built with.

    Raises:
        UsageError: a size is not positive, or the rank is not one of `world_size`.
    """
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(f"the loader's {name.replace('_', ' ')} is {size}: give at least 1")
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} is not one of {world_size} ranks")


def require_same(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare the identities of the loader that was saved and of this one.

    Raises:
        CheckpointError: they differ; the message has both values of what does.
    """
    if differences := compare_configs(saved, current):
        raise CheckpointError(
            f"the data loader cannot resume: {'; '.join(differences)}. Restore the old settings "
            "or data, or start a new run"
        )
