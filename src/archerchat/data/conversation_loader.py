"""Turn conversations into rows for fine-tuning, ahead of the step (SPEC section 7).

A background thread renders the conversations of a mixture and packs them whole: the longest of
100 that still fits, and padding when none does. Conversations longer than a row are truncated,
after a complete answer if one fits, so that none stays in the buffer for ever. Conversations
without a token to learn are dropped. Every row therefore begins with a conversation and has a token
to learn.

While it is packed, a conversation is one int32 array: a token to learn is its id, any other is
`~id`. Rank r of W takes conversations r, r + W, ... A pass ends with its last row, padded; what
follows is the next pass.

    loader = ConversationLoader(mixture, tokenizer, batch_size=8, sequence_length=256)
    batch = next(loader)  # batch.inputs, batch.targets: (B, T)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from archerchat.data.packing import (
    BestFitPacker,
    Buffered,
    Document,
    Row,
    join_documents,
    split_documents,
)
from archerchat.data.prefetch import Batch, Plan, PrefetchingLoader
from archerchat.errors import DataError, UsageError
from archerchat.model.loss import IGNORED
from archerchat.tasks.base import TaskMixture
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.tokenizer.chat_format import render_conversation

PADDING = int(np.iinfo(np.int32).min)
"""Stands in a row for BOS that is there to fill it."""
BUFFER_SIZE = 100
"""Conversations to choose from."""


@dataclass(frozen=True)
class Counts:
    """What became of a rank's conversations, over all passes, up to a batch."""

    read: int = 0
    cut: int = 0
    """Conversations longer than a row, which were truncated."""
    dropped: int = 0
    """Conversations without a token to learn, or with none in what fits a row."""
    targets: int = 0
    """Positions in all rows, T per row."""
    padding: int = 0
    """Positions that only fill a row."""
    trained: int = 0
    """Positions that are learned from."""

    @property
    def padding_share(self) -> float:
        """Share of the positions that only fill rows; NaN before the first batch."""
        return self.padding / self.targets if self.targets else math.nan

    @property
    def trained_share(self) -> float:
        """Share of the positions that are learned from; NaN before the first batch."""
        return self.trained / self.targets if self.targets else math.nan


@dataclass(frozen=True)
class Used:
    """How far several loaders are together: all that share a mixture."""

    counts: Counts
    consumed: int
    share: int
    """Conversations of a pass."""
    progress: float
    """Share of the pass's conversations that the slowest loader has used."""

    @classmethod
    def of(cls, parts: Sequence[tuple[Counts, int, int]]) -> Used:
        """Add up loaders' counts, consumed conversations and shares."""
        counts, consumed, share = zip(*parts, strict=True)
        names = (each.name for each in fields(Counts))
        totals = {name: sum(getattr(each, name) for each in counts) for name in names}
        slowest = min(done / size for done, size in zip(consumed, share, strict=True))
        return cls(Counts(**totals), sum(consumed), sum(share), slowest)


def render_whole(
    tokenizer: Tokenizer, mixture: TaskMixture, index: int
) -> tuple[list[int], list[int]]:
    """Render a conversation of a mixture, however long; an error names its task and place there."""
    try:
        return render_conversation(tokenizer, mixture[index], sys.maxsize)
    except DataError as error:
        task, inner = mixture.origin(index)
        raise DataError(f"{mixture.tasks[task].name}, conversation {inner}: {error}") from error


def fit_conversation(
    ids: Sequence[int], mask: Sequence[int], row_length: int, end_id: int
) -> tuple[Document | None, bool]:
    """Truncate a rendered conversation to a row, and encode it for the packer.

    A conversation that is longer is cut after its last `end_id`, `<|assistant_end|>`, that fits.

    Returns:
        The document, None if nothing to learn is left; and whether it was truncated.
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


@dataclass(frozen=True, eq=False)
class _State:
    counts: Counts
    """Those of the batches so far; `read` is also the position."""
    documents: tuple[Buffered, ...]
    """What the packer has buffered, in its order."""


@dataclass(frozen=True)
class _Plan(Plan):
    mixture: TaskMixture
    tokenizer: Tokenizer
    repeat: bool

    @property
    def row_length(self) -> int:
        return int(self.identity["sequence_length"]) + 1

    @property
    def indices(self) -> range:
        """This rank's conversations of a pass."""
        return range(self.identity["rank"], len(self.mixture), self.identity["world_size"])


class ConversationLoader(PrefetchingLoader[_Plan, _State]):
    """Iterate over batches of packed conversations.

    The thread starts at the first `next` and stops with `close`.

    Args:
        batch_size, sequence_length: rows per batch, B, and tokens per row, T.
        prefetch: batches prepared ahead.
        repeat: begin again after a pass, even inside a batch. If false, the last batch is filled
            with rows of nothing but padding, and no other follows.

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
        sizes = {
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "buffer_size": buffer_size,
        }
        assert min(*sizes.values(), prefetch) >= 1
        assert 0 <= rank < world_size
        if len(mixture) < world_size:
            raise UsageError(
                f"{len(mixture)} conversations cannot be shared by {world_size} ranks: use fewer "
                "ranks or more conversations"
            )
        identity = sizes | {
            "mixture": describe_mixture(mixture),
            "tokenizer": tokenizer.fingerprint,
            "rank": rank,
            "world_size": world_size,
        }
        plan = _Plan(identity, mixture, tokenizer, repeat)
        super().__init__(plan, _State(Counts(), ()), prefetch)

    @property
    def counts(self) -> Counts:
        """What became of the conversations up to the last batch returned."""
        return self._state.counts

    @property
    def consumed(self) -> int:
        """How many conversations are in the rows returned, or dropped."""
        return self.counts.read - len(self._state.documents)

    @property
    def share(self) -> int:
        """How many conversations a pass has for this rank."""
        return len(self._plan.indices)

    @property
    def progress(self) -> float:
        """Share of the pass's conversations that are used so far; 1 or more after a pass."""
        return self.consumed / self.share

    def state_dict(self) -> dict[str, Any]:
        """Return `identity` and `counts`, as JSON, and the buffered conversations: `tokens`, end
        to end (int32), and their `lengths` (int64)."""
        documents = join_documents(self._state.documents, np.int32)
        return {"identity": dict(self._plan.identity), "counts": asdict(self.counts), **documents}

    def _parse(self, state: Mapping[str, Any]) -> _State:
        return _State(Counts(**state["counts"]), split_documents(state, self._plan.row_length))

    def _iter_after(self, state: _State) -> Iterator[tuple[Batch, _State]]:
        return _RowSource(self._plan, state).iter_batches()


def describe_mixture(mixture: TaskMixture) -> dict[str, Any]:
    """Return what decides a mixture's conversations, each task under its number."""
    described = mixture.describe()
    return described | {"tasks": {str(i): task for i, task in enumerate(described["tasks"])}}


class _RowSource:
    """Read, render and pack, counting what happens."""

    def __init__(self, plan: _Plan, state: _State) -> None:
        self._plan, self._counts = plan, state.counts
        self._packer = BestFitPacker(plan.row_length, plan.identity["buffer_size"], PADDING)
        for document in state.documents:
            self._packer.add(document.tokens)
        self._end_id = plan.tokenizer.special_id("<|assistant_end|>")

    def iter_batches(self) -> Iterator[tuple[Batch, _State]]:
        """Yield batches, each with the state after it."""
        size, pending = self._plan.identity["batch_size"], list[Row]()
        for row in self.iter_rows():
            pending.append(row)
            if len(pending) == size:
                yield self._batch(pending), _State(self._counts, self._packer.documents())
                pending = []
        if pending:
            empty = np.full(self._plan.row_length, PADDING, np.int64)
            pending += [empty] * (size - len(pending))
            yield self._batch(pending), _State(self._counts, self._packer.documents())

    def _batch(self, pending: list[Row]) -> Batch:
        """Turn rows into inputs and targets, and count their positions."""
        rows, counts = np.stack(pending), self._counts  # (B, T + 1)
        ids = np.where(
            rows >= 0, rows, np.where(rows == PADDING, self._plan.tokenizer.bos_id, ~rows)
        )
        targets = np.where(rows >= 0, rows, IGNORED)[:, 1:]
        self._counts = replace(
            counts,
            targets=counts.targets + targets.size,
            padding=counts.padding + int((rows[:, 1:] == PADDING).sum()),
            trained=counts.trained + int((targets >= 0).sum()),
        )
        return Batch(np.stack((ids[:, :-1], targets)))

    def iter_rows(self) -> Iterator[Row]:
        """Yield the rows of this pass from where it is, and those of the passes that follow."""
        share = len(self._plan.indices)
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
                    # Fill now, so that conversations to be dropped at the end of the pass are
                    # read with its last row, and the pass is then known to be over.
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
        plan = self._plan
        while (counts := self._counts).read < end and self._packer.needs_documents():
            index = plan.indices[counts.read % len(plan.indices)]
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
