"""Cut documents into rows of T + 1 tokens, by best fit or one after the other (SPEC section 4).

Documents are added to a packer's buffer and move one at a time into the open row; full rows are
returned. Between rows a packer's whole state is its buffered documents, in order: a snapshot is a
tuple of references, and a restart adds them again. Of a document longer than a row, best fit keeps
only its length and the tokens that a row can take.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

Packing = Literal["best-fit", "concat"]
BUFFER_SIZE = 1000
"""Number of documents that best fit chooses from."""
Document = NDArray[Any]
"""Token ids of one document, the first being BOS: 1-D, unsigned, never modified."""
Row = NDArray[np.int64]


class Buffered(NamedTuple):
    """A document that waits for a row."""

    tokens: Document
    """At most those that a row can take."""
    length: int
    """Number of tokens before any were cut, by which best fit chooses."""
    start: int = 0
    """Number of its tokens that are in rows already; the rest follows another BOS."""

    def rest(self) -> Document:
        """Return the tokens that are not in a row yet, as a document."""
        if not self.start:
            return self.tokens
        return np.concatenate((self.tokens[:1], self.tokens[self.start :]))


class _OpenRow:
    def __init__(self, row_length: int) -> None:
        assert row_length >= 2, row_length
        self.row_length = row_length
        self.dropped = 0
        """Number of tokens that were cut off."""
        self._row, self._used = np.empty(row_length, np.int64), 0

    @property
    def _space(self) -> int:
        return self.row_length - self._used

    def _put(self, tokens: Document) -> Row | None:
        """Append `tokens`, which must fit; return the row if that filled it."""
        end = self._used + len(tokens)
        self._row[self._used : end] = tokens
        if end < self.row_length:
            self._used = end
            return None
        full, self._row, self._used = self._row, np.empty_like(self._row), 0
        return full


class BestFitPacker(_OpenRow):
    """Place the longest buffered document that fits; when none does, fill the row.

    Of documents of equal length the first is taken. A row is filled by cropping the shortest
    document (SPEC section 4), so no row holds padding and every document in a row starts with BOS.

    Args:
        row_length: T + 1, since inputs and targets overlap by one token.
        buffer_size: least number of documents to choose from.
        padding: fills a row instead (SPEC section 7); every document must then fit into a row.
    """

    def __init__(self, row_length: int, buffer_size: int, padding: int | None = None) -> None:
        super().__init__(row_length)
        self._buffer_size, self._padding = buffer_size, padding
        self._arrivals, self._by_arrival = count(), dict[int, Buffered]()
        self._sorted: list[tuple[int, int]] = []
        """Length and arrival of each document, in order, so that choosing is a binary search."""

    def add(self, document: Document, length: int | None = None) -> None:
        """Buffer a document of at least one token; a cropped one had `length`."""
        length = length or len(document)
        assert self._padding is None or length <= self.row_length, "no row would ever take it"
        if len(document) > self.row_length:
            document = document[: self.row_length].copy()
        arrival = next(self._arrivals)
        insort(self._sorted, (length, arrival))
        self._by_arrival[arrival] = Buffered(document, length)

    def needs_documents(self) -> bool:
        """Whether documents must be added before the next `place`."""
        return len(self._sorted) < self._buffer_size

    def place(self) -> Row | None:
        """Move a document from the buffer to the open row; return the row once it is full."""
        fitting = bisect_left(self._sorted, (self._space + 1,))
        if fitting > 0:
            longest = self._sorted[fitting - 1][0]
            return self._put(self._pop(bisect_left(self._sorted, (longest,))).tokens)
        if self._padding is not None:
            return self.finish()
        shortest = self._pop(0)
        self.dropped += shortest.length - self._space
        return self._put(shortest.tokens[: self._space])

    def finish(self) -> Row | None:
        """Pad the open row and return it; None if it is empty."""
        assert self._padding is not None
        return self._put(np.full(self._space, self._padding)) if self._used else None

    def documents(self) -> tuple[Buffered, ...]:
        """Return the buffered documents, in the order to add them again; only between rows."""
        assert not self._used
        return tuple(self._by_arrival.values())

    def __len__(self) -> int:
        return len(self._sorted)

    def _pop(self, index: int) -> Buffered:
        return self._by_arrival.pop(self._sorted.pop(index)[1])


class ConcatPacker(_OpenRow):
    """Place documents in order; what does not fit continues in the next row, after a BOS.

    A document `BOS a b c` that meets two free tokens leaves `BOS a` at the end of this row and
    starts the next with `BOS b c`. Nothing is dropped, and every token after a document's BOS is a
    target exactly once.
    """

    def __init__(self, row_length: int) -> None:
        super().__init__(row_length)
        self._queue: deque[Buffered] = deque()

    def add(self, document: Document, length: int | None = None) -> None:
        self._queue.append(Buffered(document, len(document)))

    def needs_documents(self) -> bool:
        return not self._queue

    def place(self) -> Row | None:
        tokens, length, start = self._queue.popleft()
        if start:
            self._put(tokens[:1])
        end = start + self._space
        if end < length:
            self._queue.appendleft(Buffered(tokens, length, end))
        return self._put(tokens[start:end])

    def documents(self) -> tuple[Buffered, ...]:
        assert not self._used
        return tuple(self._queue)


def join_documents(documents: Sequence[Buffered], dtype_if_none: DTypeLike) -> dict[str, Tensor]:
    """Return documents end to end, `tokens`, and their original `lengths` (int64)."""
    rests = [document.rest() for document in documents]
    lengths = [len(r) if d.start else d.length for d, r in zip(documents, rests, strict=True)]
    tokens = np.concatenate(rests or [np.empty(0, dtype_if_none)])
    return {"tokens": torch.from_numpy(tokens), "lengths": torch.tensor(lengths, dtype=torch.int64)}


def split_documents(state: Mapping[str, Any], row_length: int) -> tuple[Buffered, ...]:
    """Undo `join_documents`; a broken state is a KeyError or ValueError.

    Of a document longer than `row_length` a row is saved; older checkpoints and `concat` save all.
    """
    tokens, lengths = state["tokens"].numpy(), state["lengths"].tolist()
    sizes = lengths if sum(lengths) == len(tokens) else [min(n, row_length) for n in lengths]
    if tokens.ndim != 1 or min(lengths, default=1) < 1 or sum(sizes) != len(tokens):
        raise ValueError(f"{tokens.shape} tokens in documents of {sum(lengths)} tokens")
    pieces = np.split(tokens, np.cumsum(sizes)[:-1]) if sizes else ()
    return tuple(map(Buffered, pieces, lengths))
