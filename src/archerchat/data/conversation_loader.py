"""Turn conversations into rows for fine-tuning, ahead of the step (SPEC section 7).

A row takes the longest of 100 conversations that still fits, and padding when none does.
Conversations longer than a row are truncated, after a complete answer if one fits. Conversations
without a token to learn are dropped, so every row has one.

While it is packed, a conversation is one int32 array: a token to learn is its id, any other is
`~id`. Rank r of W takes conversations r, r + W, ... The last row of a pass is padded.

    loader = ConversationLoader(mixture, tokenizer, batch_size=8, sequence_length=256)
    batch = next(loader)  # batch.inputs, batch.targets: (B, T)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import chain, count
from operator import add
from typing import Any

import numpy as np

from archerchat.data.packing import BestFitPacker, Document, Row
from archerchat.data.prefetch import Batch, PrefetchingLoader, State, stack_rows
from archerchat.errors import DataError, UsageError
from archerchat.model.loss import IGNORED
from archerchat.tasks.base import TaskMixture
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.tokenizer.chat_format import render_conversation

PADDING = int(np.iinfo(np.int32).min)
"""Marks padding in a row; it becomes BOS in the batch."""
BUFFER_SIZE = 100
"""Number of conversations to choose from."""


@dataclass(frozen=True)
class Counts:
    """How a rank's conversations were used, over all passes."""

    read: int = 0
    cut: int = 0
    """Conversations that were truncated to a row."""
    dropped: int = 0
    """Conversations without a token to learn in the part that fits a row."""
    targets: int = 0
    """Positions in all rows, T per row."""
    padding: int = 0
    """Positions of padding."""
    trained: int = 0
    """Positions that are learned from."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(add, astuple(self), astuple(other)))

    @property
    def padding_share(self) -> float:
        """Share of the positions that are padding; NaN before the first batch."""
        return self.padding / self.targets if self.targets else math.nan

    @property
    def trained_share(self) -> float:
        """Share of the positions that are learned from; NaN before the first batch."""
        return self.trained / self.targets if self.targets else math.nan


@dataclass(frozen=True)
class Used:
    """Progress of one loader, or of several that share a mixture."""

    counts: Counts
    consumed: int
    """Conversations that are in returned rows, or were dropped."""
    progress: float
    """Passes over the mixture that the slowest loader has used."""

    @classmethod
    def of(cls, parts: Sequence[Used]) -> Used:
        return cls(
            sum((part.counts for part in parts), Counts()),
            sum(part.consumed for part in parts),
            min(part.progress for part in parts),
        )


def render_whole(
    tokenizer: Tokenizer, mixture: TaskMixture, index: int
) -> tuple[list[int], list[int]]:
    """Render a conversation of a mixture in full; an error names its task and its index there."""
    try:
        return render_conversation(tokenizer, mixture[index], sys.maxsize)
    except DataError as error:
        task, inner = mixture.origin(index)
        raise DataError(f"{mixture.tasks[task].name}, conversation {inner}: {error}") from error


def fit_conversation(
    ids: Sequence[int], mask: Sequence[int], row_length: int, end_id: int
) -> tuple[Document | None, bool]:
    """Cut a rendered conversation after the last `end_id` that fits a row; encode it for packing.

    Returns:
        The document, None if no token to learn is left; and whether it was truncated.
    """
    tokens, learned = np.asarray(ids, np.int32), np.asarray(mask, bool)
    if cut := len(tokens) > row_length:
        ends = np.flatnonzero(tokens[:row_length] == end_id)
        length = int(ends[-1]) + 1 if len(ends) else row_length
        tokens, learned = tokens[:length], learned[:length]
    if not learned[1:].any():  # nothing predicts the first token
        return None, cut
    return np.where(learned, tokens, ~tokens), cut


@dataclass(frozen=True)
class _Progress:
    counts: Counts = Counts()
    """Counts up to the last batch; `read` is also the position."""


class ConversationLoader(PrefetchingLoader[_Progress]):
    """Iterate over batches of packed conversations.

    Args:
        batch_size, sequence_length: rows per batch, B, and tokens per row, T.
        repeat: begin again after a pass, even inside a batch. If false, rows of padding fill the
            last batch.

    Raises:
        UsageError: there are fewer conversations than ranks.
        DataError: a conversation is malformed (from `next`), or none has a token to learn.
    """

    def __init__(
        self,
        mixture: TaskMixture,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        sequence_length: int,
        rank: int = 0,
        world_size: int = 1,
        buffer_size: int = BUFFER_SIZE,
        prefetch: int = 4,
        repeat: bool = True,
    ) -> None:
        assert min(batch_size, sequence_length, buffer_size, prefetch) >= 1
        assert 0 <= rank < world_size
        if len(mixture) < world_size:
            raise UsageError(
                f"{len(mixture)} conversations cannot be shared by {world_size} ranks: use fewer "
                "ranks or more conversations"
            )
        identity = {
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "buffer_size": buffer_size,
            "mixture": mixture.describe(),
            "tokenizer": tokenizer.fingerprint,
            "rank": rank,
            "world_size": world_size,
        }
        super().__init__(identity, _Progress(), prefetch, np.int32)
        self._mixture, self._tokenizer, self._repeat = mixture, tokenizer, repeat
        self._indices = range(rank, len(mixture), world_size)

    @property
    def used(self) -> Used:
        """How this rank's conversations were used up to the last returned batch."""
        counts = self._state.progress.counts
        consumed = counts.read - len(self._state.documents)
        return Used(counts, consumed, consumed / len(self._indices))

    def _parse(self, state: Mapping[str, Any]) -> _Progress:
        return _Progress(Counts(**state["counts"]))

    def _iter_after(self, state: State[_Progress]) -> Iterator[tuple[Batch, State[_Progress]]]:
        batch_size, row_length = self._identity["batch_size"], self._identity["sequence_length"] + 1
        self._counts = state.progress.counts
        self._packer = BestFitPacker(row_length, self._identity["buffer_size"], PADDING)
        for document in state.documents:
            self._packer.add(document.tokens)
        # Rows of padding fill the last batch; those that none needs are dropped.
        padding = np.full(row_length, PADDING, np.int64)
        passes = (row for _ in count() for row in self._iter_pass())
        source = passes if self._repeat else chain(self._iter_pass(), [padding] * (batch_size - 1))
        for rows in stack_rows(source, batch_size):  # (B, T + 1)
            ids = np.where(
                rows == PADDING, self._tokenizer.bos_id, np.where(rows >= 0, rows, ~rows)
            )
            targets = np.where(rows >= 0, rows, IGNORED)[:, 1:]
            self._counts += Counts(
                targets=targets.size,
                padding=int((rows[:, 1:] == PADDING).sum()),
                trained=int((targets >= 0).sum()),
            )
            batch = Batch(np.stack((ids[:, :-1], targets)))
            yield batch, State(_Progress(self._counts), self._packer.documents())

    def _iter_pass(self) -> Iterator[Row]:
        """Yield the rows of this pass from where it is."""
        share, dropped = len(self._indices), self._counts.dropped
        passes, rest = divmod(self._counts.read, share)
        draining = rest == 0 and len(self._packer) > 0  # the pass is read, but not yet packed
        end = (passes if draining else passes + 1) * share
        self._fill(end)
        while len(self._packer):
            row = self._packer.place()
            # Fill now, so that conversations to be dropped at the end of the pass are read with its
            # last row, and the pass is then known to be over.
            self._fill(end)
            if row is None and not len(self._packer):
                row = self._packer.finish()
            if row is not None:
                yield row
        if self._counts.dropped - dropped == share:
            raise DataError(
                f"none of {share} conversations has a word of the assistant to learn within "
                f"{self._packer.row_length - 1} tokens: give others, or a longer row"
            )

    def _fill(self, end: int) -> None:
        """Fill the buffer from the pass that ends at `end`."""
        end_id = self._tokenizer.special_id("<|assistant_end|>")
        while self._counts.read < end and self._packer.needs_documents():
            index = self._indices[self._counts.read % len(self._indices)]
            rendered = render_whole(self._tokenizer, self._mixture, index)
            document, cut = fit_conversation(*rendered, self._packer.row_length, end_id)
            if document is None:
                self._counts += Counts(read=1, dropped=1)
            else:
                self._counts += Counts(read=1, cut=int(cut))
                self._packer.add(document)
