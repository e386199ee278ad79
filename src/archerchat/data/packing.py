"""Cut documents into rows of T + 1 tokens, by best fit or one after the other (SPEC section 4).

The packers are pure: documents go in, one at a time leaves the buffer for the open row, full
rows come out. Between rows a packer's whole state is the documents it still holds, in order, so
a snapshot is a tuple of references and a restart is adding them again.

Best fit looks for the longest document that fits. Documents are kept sorted by the integer
`length << 40 | arrival`, so that choosing one is a binary search and the tie-break by arrival
is the order itself.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from archerchat.errors import DataError

Packing = Literal["best-fit", "concat"]
Document = NDArray[Any]
"""Token ids of one document, the first being BOS: 1-D, unsigned, never modified."""
Row = NDArray[np.int64]

_ARRIVAL_BITS = 40
_LAST_ARRIVAL = (1 << _ARRIVAL_BITS) - 1


class Packer(Protocol):
    """Collect documents and place them in rows, one choice at a time."""

    def add(self, document: Document) -> None:
        """Buffer a document of at least one token."""

    def needs_documents(self) -> bool:
        """Tell whether the buffer must be filled up before the next choice."""

    def place(self) -> Row | None:
        """Put the next document in the open row; return the row once it is full.

        The buffer must not be empty.
        """

    def documents(self) -> tuple[Document, ...]:
        """Return what is buffered, in the order in which to add it again; only between rows."""


class _OpenRow:
    """Fill rows of one length."""

    def __init__(self, length: int) -> None:
        self._row: Row = np.empty(length, np.int64)
        self._used = 0

    @property
    def space(self) -> int:
        return len(self._row) - self._used

    @property
    def is_empty(self) -> bool:
        return self._used == 0

    def put(self, tokens: Document) -> Row | None:
        """Append `tokens`, which must fit; return the row if that filled it."""
        end = self._used + len(tokens)
        self._row[self._used : end] = tokens
        if end < len(self._row):
            self._used = end
            return None
        full, self._row, self._used = self._row, np.empty_like(self._row), 0
        return full


class BestFitPacker:
    """Place the longest buffered document that fits; crop the shortest when none does.

    Of documents of equal length the first to arrive is taken. What a crop cuts off is dropped,
    so no row holds padding and every document in a row starts with BOS.

    Args:
        row_length: T + 1, since inputs and targets overlap by one token.
        buffer_size: how many documents to choose from, at least.
    """

    def __init__(self, row_length: int, buffer_size: int) -> None:
        self._open = _OpenRow(row_length)
        self._buffer_size = buffer_size
        self._by_arrival: dict[int, Document] = {}
        self._keys: list[int] = []
        self._arrivals = 0

    def add(self, document: Document) -> None:
        insort(self._keys, len(document) << _ARRIVAL_BITS | self._arrivals)
        self._by_arrival[self._arrivals] = document
        self._arrivals += 1

    def needs_documents(self) -> bool:
        return len(self._keys) < self._buffer_size

    def place(self) -> Row | None:
        index = self._longest_fitting()
        if index is None:
            return self._open.put(self._pop(0)[: self._open.space])
        return self._open.put(self._pop(index))

    def documents(self) -> tuple[Document, ...]:
        assert self._open.is_empty
        return tuple(self._by_arrival.values())

    def __len__(self) -> int:
        """Return how many documents are buffered."""
        return len(self._keys)

    def _longest_fitting(self) -> int | None:
        """Return the place in `_keys` of the document to take; None when none fits."""
        fitting = bisect_right(self._keys, self._open.space << _ARRIVAL_BITS | _LAST_ARRIVAL)
        if fitting == 0:
            return None
        longest = self._keys[fitting - 1] >> _ARRIVAL_BITS
        return bisect_left(self._keys, longest << _ARRIVAL_BITS)

    def _pop(self, index: int) -> Document:
        return self._by_arrival.pop(self._keys.pop(index) & _LAST_ARRIVAL)


class PaddingPacker(BestFitPacker):
    """Place the longest buffered document that fits; pad the row when none does (SPEC section 7).

    Nothing is cropped: every document must fit an empty row.

    Args:
        padding: what fills the rest of a row.
    """

    def __init__(self, row_length: int, buffer_size: int, padding: int) -> None:
        super().__init__(row_length, buffer_size)
        self._row_length, self._padding = row_length, padding

    def add(self, document: Document) -> None:
        assert len(document) <= self._row_length, "no row would ever take it"
        super().add(document)

    def place(self) -> Row | None:
        index = self._longest_fitting()
        return self.finish() if index is None else self._open.put(self._pop(index))

    def finish(self) -> Row | None:
        """Pad the open row and return it; None if nothing is in it."""
        if self._open.is_empty:
            return None
        return self._open.put(np.full(self._open.space, self._padding))


class ConcatPacker:
    """Place documents in order; what does not fit goes on in the next row, after a BOS.

    A document `BOS a b c` that meets two free tokens leaves `BOS a` at the end of this row and
    starts the next with `BOS b c`. Nothing is dropped: every token after a document's BOS is a
    target exactly once, and every row starts with BOS.
    """

    def __init__(self, row_length: int) -> None:
        assert row_length >= 2, row_length
        self._open = _OpenRow(row_length)
        self._queue: deque[Document] = deque()

    def add(self, document: Document) -> None:
        self._queue.append(document)

    def needs_documents(self) -> bool:
        return not self._queue

    def place(self) -> Row | None:
        document = self._queue.popleft()
        space = self._open.space
        if len(document) > space:
            # The remainder with its BOS is a document like any other: no further state.
            self._queue.appendleft(np.concatenate((document[:1], document[space:])))
        return self._open.put(document[:space])

    def documents(self) -> tuple[Document, ...]:
        assert self._open.is_empty
        return tuple(self._queue)


def build_packer(packing: Packing, row_length: int, buffer_size: int) -> Packer:
    """Build the packer of that name; only best fit has a use for `buffer_size`."""
    if packing == "best-fit":
        return BestFitPacker(row_length, buffer_size)
    return ConcatPacker(row_length)


def pack_best_fit(documents: Sequence[list[int]], row_length: int) -> list[list[int]]:
    """Pack documents into rows of exactly `row_length` tokens.

    Each row takes the longest document that still fits; when none fits, the shortest
    is cropped to fill the gap, so no row holds padding (SPEC section 4). A last row that the
    documents cannot fill is left out.

    Args:
        documents: token ids, each starting with BOS; not modified.
        row_length: T + 1, since inputs and targets overlap by one token.

    Raises:
        DataError: the documents cannot fill one row.
    """
    packer = BestFitPacker(row_length, buffer_size=1)
    for document in documents:
        packer.add(np.asarray(document))
    rows: list[list[int]] = []
    while not packer.needs_documents():
        if (row := packer.place()) is not None:
            rows.append(row.tolist())
    if not rows:
        raise DataError(
            f"{len(documents)} documents with {sum(map(len, documents))} tokens cannot fill one "
            f"row of {row_length}: give more text or a shorter row"
        )
    return rows
