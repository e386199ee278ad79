"""What the loaders of text and of conversations share: packing ahead of the step, and resuming.

A background thread reads, tokenizes and packs, so that the step finds its batch ready. Every batch
comes with the state after it: a checkpoint's state is that of the last batch that the caller got,
however far the thread has run ahead. A state is a tuple of references, which become tensors only
when a checkpoint asks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from archerchat.config import compare_configs
from archerchat.data.packing import Buffered, Row, join_documents, split_documents
from archerchat.errors import CheckpointError

ProgressT = TypeVar("ProgressT")


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


@dataclass(frozen=True, eq=False)
class State(Generic[ProgressT]):
    """What decides the batches that follow, beside a loader's identity."""

    progress: ProgressT
    """How far the documents have been read: a dataclass of JSON values."""
    documents: tuple[Buffered, ...] = ()
    """What the packer has buffered, in its order."""


class PrefetchingLoader(ABC, Generic[ProgressT]):
    """Iterate over batches that a thread prepares.

    The thread starts at the first `next` and ends with `close`, or after the loader is forgotten.

    Args:
        identity: what decides which batches are yielded, as JSON; `batch_size` and
            `sequence_length` are among it.
        progress: that of a new loader.
        prefetch: batches prepared ahead.
        dtype: of the state's tokens while no document is buffered.
    """

    def __init__(
        self, identity: Mapping[str, Any], progress: ProgressT, prefetch: int, dtype: DTypeLike
    ) -> None:
        self._identity, self._prefetch, self._dtype = identity, prefetch, dtype
        self._state = State(progress)
        self._pool: ThreadPoolExecutor | None = None
        self._batches: Iterator[tuple[Batch, State[ProgressT]]] = iter(())
        self._pending = deque[Future[tuple[Batch, State[ProgressT]]]]()

    @abstractmethod
    def _iter_after(self, state: State[ProgressT]) -> Iterator[tuple[Batch, State[ProgressT]]]:
        """Yield each batch after `state` with the state after it, in the thread.

        What is returned must not refer to the loader, or the loader could not be forgotten.
        """

    @abstractmethod
    def _parse(self, state: Mapping[str, Any]) -> ProgressT:
        """Read the progress out of what `state_dict` returned; what is missing or does not fit is
        a KeyError, TypeError or ValueError."""

    def state_dict(self) -> dict[str, Any]:
        """Return what decides the batch after the last one returned: the `identity` and the
        progress as JSON; of the buffered documents `tokens`, end to end, and `lengths` (int64)."""
        progress: Any = self._state.progress
        documents = join_documents(self._state.documents, self._dtype)
        return {"identity": dict(self._identity), **asdict(progress), **documents}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the row after the saved batch; rows are whole between batches, so batches
        may be of another size.

        Raises:
            CheckpointError: the state is broken, or this loader would not yield the same batches;
                the message says what differs.
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
        """Return the saved identity less what may differ, and the identity to continue with."""
        return saved, self._identity

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
            self._batches = self._iter_after(self._state)
            for _ in range(self._prefetch):
                self._pending.append(self._pool.submit(next, self._batches))
        batch, self._state = self._pending[0].result()  # an error stays first, to be raised again
        self._pending.popleft()
        self._pending.append(self._pool.submit(next, self._batches))
        return batch

    def close(self) -> None:
        """Stop the background thread; a later `next` starts it again where it was."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            self._pending.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def stack_rows(rows: Iterable[Row], batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Yield the rows in arrays of (B, T + 1); a rest too small for one is dropped."""
    pending: list[Row] = []
    for row in rows:
        pending.append(row)
        if len(pending) == batch_size:
            yield np.stack(pending)
            pending = []
