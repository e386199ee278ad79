"""The base of the loaders of text and of conversations: packing ahead of the step, and resuming.

A background thread reads, tokenizes and packs, so that batches are ready when a step needs them.
Every batch comes with the state after it, and a checkpoint saves the state of the last batch that
the caller got. A state is a tuple of references; tensors are made of it only for a checkpoint.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from archerchat.config import compare_configs
from archerchat.data.packing import Buffered, Row, join_documents, split_documents
from archerchat.errors import CheckpointError

ProgressT = TypeVar("ProgressT")


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
    """Those in the packer's buffer, in its order."""


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
