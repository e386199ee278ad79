"""Run an iterator ahead of its consumer in a background thread.

`Prefetcher` is the thread. `PrefetchingLoader` is what the loaders of text and of conversations
share: batches that travel with the state after them. A checkpoint's state is therefore that of the
last batch that the caller got, however far the thread has run ahead.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from archerchat.config import compare_configs
from archerchat.errors import CheckpointError

T = TypeVar("T")
PlanT = TypeVar("PlanT", bound="Plan")
StateT = TypeVar("StateT")


class Prefetcher(Generic[T]):
    """Iterate over `source`, whose next items a thread prepares meanwhile.

    What `source` raises, `next` raises after the items before it. The thread ends with `close`,
    when this object is collected, or before the interpreter exits.

    Attributes:
        wait_seconds: how long `next` has waited, in all.
    """

    def __init__(self, source: Iterator[T], depth: int) -> None:
        self.wait_seconds = 0.0
        self._source = source
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._finalizer = weakref.finalize(self, _stop, self._pool)
        self._pending = deque(self._pool.submit(next, source) for _ in range(depth))

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self._finalizer.alive:
            raise StopIteration
        began = time.perf_counter()
        error = self._pending[0].exception()
        self.wait_seconds += time.perf_counter() - began
        if error is not None:  # stays first, to be raised again
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise error
        self._pending.append(self._pool.submit(next, self._source))
        return self._pending.popleft().result()

    def close(self) -> None:
        """Stop the thread; `next` then raises StopIteration. May be called again."""
        self._finalizer()


def _stop(pool: ThreadPoolExecutor) -> None:
    with contextlib.suppress(RuntimeError):  # collected by the thread, which cannot join itself
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, eq=False)
class Batch:
    """Hold B rows of T token ids and, below them, the ids to predict, -1 where there are none."""

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


@dataclass(frozen=True)
class Plan:
    """What the thread needs; it must not refer to the loader, or the loader is never collected."""

    identity: Mapping[str, Any]
    """What decides which batches are yielded, as JSON."""


class PrefetchingLoader(ABC, Generic[PlanT, StateT]):
    """Iterate over batches that a thread prepares; a checkpoint holds the state after the last one.

    The thread starts at the first `next`, stays `depth` batches ahead, and stops with `close`.
    """

    def __init__(self, plan: PlanT, state: StateT, depth: int) -> None:
        self._plan, self._state, self._depth = plan, state, depth
        self._prefetcher: Prefetcher[tuple[Batch, StateT]] | None = None
        self._waited = 0.0

    @abstractmethod
    def _iter_after(self, state: StateT) -> Iterator[tuple[Batch, StateT]]:
        """Yield each batch after `state` with the state after it, without referring to `self`."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what decides the batch after the last one returned: tensors and JSON values."""

    @abstractmethod
    def _parse(self, state: Mapping[str, Any]) -> StateT:
        """Read what `state_dict` returned, except for the identity; what is missing or does not
        fit is a KeyError, TypeError or ValueError."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the row after the saved batch; rows are whole between batches, so batches
        may be of another size.

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
        if "batch_size" in identity:
            identity["batch_size"] = self._plan.identity.get("batch_size")
        plan, saved = self._reconcile(identity)
        if differences := compare_configs(saved, plan.identity):
            raise CheckpointError(
                f"the data loader cannot resume: {'; '.join(differences)}. Restore the old "
                "settings or data, or start a new run"
            )
        self.close()
        self._plan, self._state = plan, parsed

    def _reconcile(self, identity: Mapping[str, Any]) -> tuple[PlanT, Mapping[str, Any]]:
        """Return the plan to continue with, and the saved identity less what may differ."""
        return self._plan, identity

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
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
