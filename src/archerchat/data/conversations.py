"""Turn conversations into rows for fine-tuning, ahead of the step (SPEC section 7).

A background thread renders the conversations of a mixture and packs them whole: the longest of
100 that still fits, and padding when none does. One that is longer than a row is cut to it, at the
end of an answer where one fits, so that none stays in the buffer for ever; one that leaves nothing
to learn is dropped. Every row therefore begins with a conversation and has a token to learn.

While it is packed, a conversation is one int32 array: a token to learn is its id, any other is
`~id`. Rank r of W takes conversations r, r + W, ... A pass ends with its last row, padded; what
follows is the next pass.

    loader = ConversationLoader(mixture, tokenizer, batch_size=8, sequence_length=256)
    batch = next(loader)  # batch.inputs, batch.targets: (B, T)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archerchat.checkpoint import compare_configs
from archerchat.data.conversation_state import ConversationState, Counts
from archerchat.data.packing import Document, PaddingPacker, Row
from archerchat.data.prefetch import PrefetchingLoader, check_sizes
from archerchat.errors import CheckpointError, DataError, UsageError
from archerchat.model.loss import IGNORED
from archerchat.tasks.base import TaskMixture
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.tokenizer.chat_format import render_conversation

PADDING = int(np.iinfo(np.int32).min)
"""Stands in a row for BOS that is there to fill it."""
BUFFER_SIZE = 100
"""Conversations to choose from."""


@dataclass(frozen=True, eq=False)
class ConversationBatch:
    """Hold B rows of T tokens and what to predict, -1 where there is nothing to learn."""

    inputs: NDArray[np.int64]
    """(B, T)"""
    targets: NDArray[np.int64]
    """(B, T)"""


def render_whole(
    tokenizer: Tokenizer, mixture: TaskMixture, index: int
) -> tuple[list[int], list[int]]:
    """Render a conversation of a mixture, however long it is.

    Raises:
        DataError: it is malformed; the message names its task and its place there.
    """
    try:
        return render_conversation(tokenizer, mixture[index], sys.maxsize)
    except DataError as error:
        task, inner = mixture.origin(index)
        raise DataError(f"{mixture.tasks[task].name}, conversation {inner}: {error}") from error


def fit_conversation(
    ids: Sequence[int], mask: Sequence[int], row_length: int, end_id: int
) -> tuple[Document | None, bool]:
    """Cut a rendered conversation to a row, and write it as the packer takes it.

    Args:
        ids, mask: from `render_conversation`.
        row_length: T + 1.
        end_id: `<|assistant_end|>`, behind which to cut if one fits.

    Returns:
        The document, None if it leaves nothing to learn; and whether it was cut.
    """
    tokens, learned = np.asarray(ids, np.int32), np.asarray(mask, bool)
    cut = len(tokens) > row_length
    if cut:
        ends = np.flatnonzero(tokens[:row_length] == end_id)
        length = int(ends[-1]) + 1 if len(ends) else row_length
        tokens, learned = tokens[:length], learned[:length]
    if not learned[1:].any():  # nothing predicts the first token
        return None, cut
    return np.where(learned, tokens, ~tokens), cut


def split_rows(rows: NDArray[np.int64], bos_id: int) -> ConversationBatch:
    """Turn rows (B, T + 1) as the packer makes them into inputs and targets."""
    ids = np.where(rows >= 0, rows, np.where(rows == PADDING, bos_id, ~rows))
    targets = np.where(rows >= 0, rows, IGNORED)
    return ConversationBatch(
        np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(targets[:, 1:])
    )


@dataclass(frozen=True)
class _Plan:
    """What the thread needs; it must not refer to the loader, or that is never collected."""

    mixture: TaskMixture
    tokenizer: Tokenizer
    identity: Mapping[str, Any]
    batch_size: int
    row_length: int
    buffer_size: int
    rank: int
    world_size: int
    repeat: bool

    @property
    def share(self) -> int:
        """Conversations of this rank in a pass."""
        return len(range(self.rank, len(self.mixture), self.world_size))


class ConversationLoader(PrefetchingLoader[ConversationBatch, ConversationState]):
    """Iterate over batches of packed conversations.

    The thread starts at the first `next` and stops with `close`.

    Args:
        mixture: what to read, in its order.
        batch_size: rows in a batch, B.
        sequence_length: tokens in a row, T.
        buffer_size: conversations to choose from.
        prefetch: batches prepared ahead.
        repeat: begin again after a pass, even inside a batch; otherwise the last batch is filled
            with rows of nothing but padding, and no other follows.

    Raises:
        UsageError: a size is not positive, the rank is not one of `world_size`, or there are
            fewer conversations than ranks.
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
        sizes = {
            "batch size": batch_size,
            "sequence length": sequence_length,
            "buffer size": buffer_size,
            "prefetch depth": prefetch,
        }
        check_sizes(sizes, rank, world_size)
        if len(mixture) < world_size:
            raise UsageError(
                f"{len(mixture)} conversations cannot be shared by {world_size} ranks: use fewer "
                "ranks or more conversations"
            )
        identity = {
            "mixture": describe_mixture(mixture),
            "tokenizer": tokenizer.fingerprint,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "buffer_size": buffer_size,
            "rank": rank,
            "world_size": world_size,
        }
        super().__init__(ConversationState(identity, Counts(), ()), prefetch)
        self._plan = _Plan(
            mixture,
            tokenizer,
            identity,
            batch_size,
            sequence_length + 1,
            buffer_size,
            rank,
            world_size,
            repeat,
        )

    def _iter_after(
        self, state: ConversationState
    ) -> Iterator[tuple[ConversationBatch, ConversationState]]:
        return _iter_batches(self._plan, state)

    @property
    def share(self) -> int:
        """How many conversations a pass has for this rank."""
        return self._plan.share

    @property
    def progress(self) -> float:
        """Share of the pass's conversations that are used so far; 1 or more after a pass."""
        return self._state.consumed / self.share

    def restore(self, state: ConversationState, *, extend: bool = False) -> None:
        """Go on from `state`: the next batch is the one that followed it.

        Raises:
            CheckpointError: this loader would not yield the same batches, and why.
        """
        assert not extend, "a pass over a mixture has nothing to extend"
        if differences := compare_configs(state.identity, self._plan.identity):
            raise CheckpointError(
                f"the conversations cannot be resumed: {'; '.join(differences)}. Restore the old "
                f"setting or data, or start a new run"
            )
        self.close()
        self._state = state


def describe_mixture(mixture: TaskMixture) -> dict[str, Any]:
    """Return what decides a mixture's conversations, each task under its number."""
    described = mixture.describe()
    return described | {"tasks": {str(i): task for i, task in enumerate(described["tasks"])}}


def _iter_batches(
    plan: _Plan, state: ConversationState
) -> Iterator[tuple[ConversationBatch, ConversationState]]:
    """Yield each batch after `state` with the state after it."""
    source = _RowSource(plan, state)
    pending: list[Row] = []
    for row in source.iter_rows():
        pending.append(row)
        if len(pending) == plan.batch_size:
            yield source.batch(pending), source.state()
            pending = []
    if pending:
        empty = np.full(plan.row_length, PADDING, np.int64)
        yield source.batch(pending + [empty] * (plan.batch_size - len(pending))), source.state()


class _RowSource:
    """Read, render and pack, counting what happens."""

    def __init__(self, plan: _Plan, state: ConversationState) -> None:
        self._plan, self._counts = plan, state.counts
        self._packer = PaddingPacker(plan.row_length, plan.buffer_size, PADDING)
        for document in state.documents:
            self._packer.add(document)
        self._end_id = plan.tokenizer.special_id("<|assistant_end|>")

    def state(self) -> ConversationState:
        return ConversationState(self._plan.identity, self._counts, self._packer.documents())

    def batch(self, rows: list[Row]) -> ConversationBatch:
        """Make a batch of rows and count its positions."""
        stacked, counts = np.stack(rows), self._counts  # (B, T + 1)
        targets = stacked[:, 1:]
        self._counts = replace(
            counts,
            targets=counts.targets + targets.size,
            padding=counts.padding + int((targets == PADDING).sum()),
            trained=counts.trained + int((targets >= 0).sum()),
        )
        return split_rows(stacked, self._plan.tokenizer.bos_id)

    def iter_rows(self) -> Iterator[Row]:
        """Yield the rows of this pass from where it is, and those of the passes that follow."""
        share = self._plan.share
        while True:
            passes, rest = divmod(self._counts.read, share)
            draining = rest == 0 and len(self._packer) > 0  # the pass is read, but not yet packed
            end = (passes if draining else passes + 1) * share
            whole, empty = rest == 0 and not draining, True
            while True:
                self._fill(end)
                more = len(self._packer) > 0
                row = self._packer.place() if more else self._packer.finish()
                if row is not None:
                    # Now, so that conversations to be dropped at the end of the pass are read
                    # with its last row, and the pass is then known to be over.
                    self._fill(end)
                    empty = False
                    yield row
                elif not more:
                    break
            if whole and empty:
                raise DataError(
                    f"none of {share} conversations has a word of the assistant to learn within "
                    f"{self._plan.row_length - 1} tokens: give others, or a longer row"
                )
            if not self._plan.repeat:
                return

    def _fill(self, end: int) -> None:
        """Fill the buffer up, but not beyond the pass that ends at `end`."""
        while self._counts.read < end and self._packer.needs_documents():
            self._read()

    def _read(self) -> None:
        """Put the next conversation in the buffer, or drop it."""
        plan, counts = self._plan, self._counts
        index = plan.rank + plan.world_size * (counts.read % plan.share)
        rendered = render_whole(plan.tokenizer, plan.mixture, index)
        document, cut = fit_conversation(*rendered, plan.row_length, self._end_id)
        self._counts = replace(
            counts,
            read=counts.read + 1,
            cut=counts.cut + (cut and document is not None),
            dropped=counts.dropped + (document is None),
        )
        if document is not None:
            self._packer.add(document)
