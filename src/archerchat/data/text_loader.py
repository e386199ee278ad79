"""Turn text shards into training batches, ahead of the step and resumable exactly (SPEC section 4).

A background thread reads row groups, tokenizes 128 documents at a time and packs them, so that
the training step finds its batch ready; `TextLoader.wait_seconds` says how long it did not.

The reference saves a position only and loses the documents that its packer had buffered (1,041 of
them in the golden). Here a state is the position, the buffered documents, and the identity of
shards, tokenizer and settings, which a resumed loader must share. It travels with each batch as a
tuple of references, which become tensors only when a checkpoint asks.

    loader = TextLoader(train_shards, tokenizer, batch_size=8, sequence_length=256)
    batch = next(loader)  # batch.inputs, batch.targets: (B, T)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from archerchat.data.packing import (
    BUFFER_SIZE,
    BestFitPacker,
    Buffered,
    ConcatPacker,
    Packing,
    Row,
    join_documents,
    split_documents,
)
from archerchat.data.prefetch import Batch, Plan, PrefetchingLoader
from archerchat.data.shards import MAKE_DATA, Shard
from archerchat.errors import DataError
from archerchat.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class Position:
    """Name the last chunk of documents that entered the packer's buffer."""

    shard: int
    """Index in the list of shards."""
    row_group: int
    """Index in that shard."""
    epoch: int
    """Passes over the data begun, from 1."""


@dataclass(frozen=True)
class Usage:
    """What the batches so far took of the text."""

    epochs: float = 0.0
    """Passes over it, less the documents that wait in the buffer."""
    used: int = 0
    """Tokens in all rows, repeated ones too."""
    dropped: int = 0
    """Tokens that packing cut off and that are in no row."""

    @property
    def text_share(self) -> float:
        """About which share of the text has been in a row; what is repeated counts once."""
        return min(1.0, self.epochs) * self.used / max(1, self.used + self.dropped)


@dataclass(frozen=True, eq=False)
class _State:
    position: Position
    next_document: int
    """How many documents of the position's row group have been read."""
    documents: tuple[Buffered, ...] = ()
    """What the packer has buffered, in its order."""
    usage: Usage = Usage()


@dataclass(frozen=True)
class _Plan(Plan):
    """The identity has the name and size of each shard."""

    shards: tuple[Path, ...]
    tokenizer: Tokenizer
    num_threads: int


class TextLoader(PrefetchingLoader[_Plan, _State]):
    """Iterate over batches of packed tokens, epoch after epoch, without end.

    Rank r of W reads row groups r, r + W, ... of each shard. An empty text is a document too:
    a lone BOS. The thread starts at the first `next` and stops with `close`.

    Args:
        batch_size, sequence_length: rows per batch, B, and tokens per row, T.
        packing: `best-fit` drops what does not fit, `concat` continues it in the next row.
        buffer_size: documents that best fit chooses from.
        tokenizer_batch: documents that enter the buffer together, never across row groups.
        prefetch, num_threads: batches prepared ahead, and threads that tokenize.
        extend: continue a saved state into shards that follow the saved ones. By default shards
            that the saved state does not name, such as those downloaded since, are left out, so
            that the rows stay the same.

    Raises:
        DataError: a shard is missing or broken (from the constructor or from `next`), or no
            shard has a row group for each rank.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        sequence_length: int,
        rank: int = 0,
        world_size: int = 1,
        packing: Packing = "best-fit",
        buffer_size: int = BUFFER_SIZE,
        tokenizer_batch: int = 128,
        prefetch: int = 4,
        num_threads: int = 1,
        extend: bool = False,
    ) -> None:
        sizes = {
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "buffer_size": buffer_size,
            "tokenizer_batch": tokenizer_batch,
        }
        assert min(*sizes.values(), prefetch, num_threads) >= 1
        assert 0 <= rank < world_size
        _check_ranks(shards, world_size)
        identity = sizes | {
            "packing": packing,
            "rank": rank,
            "world_size": world_size,
            "tokenizer": tokenizer.fingerprint,
            "shards": _names_and_sizes(shards),
        }
        self._given = _Plan(identity, tuple(shards), tokenizer, num_threads)
        self._extend = extend
        super().__init__(self._given, _State(Position(0, rank, 1), 0), prefetch)

    @property
    def usage(self) -> Usage:
        """What the batches so far took of the text."""
        return self._state.usage

    def state_dict(self) -> dict[str, Any]:
        """Return `identity`, `position`, `next_document` and `usage`, as JSON, and the buffered
        documents: `tokens`, end to end (uint16 or uint32), and their `lengths` (int64)."""
        return {
            "identity": dict(self._plan.identity),
            "position": asdict(self._state.position),
            "next_document": self._state.next_document,
            "usage": asdict(self._state.usage),
            **join_documents(self._state.documents, np.uint16),
        }

    def _parse(self, state: Mapping[str, Any]) -> _State:
        return _State(
            Position(**state["position"]),
            int(state["next_document"]),
            split_documents(state, state["identity"]["sequence_length"] + 1),
            Usage(**state.get("usage", {})),  # older checkpoints have none
        )

    def _reconcile(self, identity: Mapping[str, Any]) -> tuple[_Plan, Mapping[str, Any]]:
        plan, now = self._given, self._given.identity
        saved, known = dict(identity), identity.get("shards", [])
        paths = dict(zip(map(tuple, now["shards"]), plan.shards, strict=True))
        if self._extend:
            if known == now["shards"][: len(known)]:
                saved["shards"] = now["shards"]
        elif paths.keys() >= set(map(tuple, known)):
            shards = tuple(paths[name, size] for name, size in known)
            plan = replace(plan, identity={**now, "shards": known}, shards=shards)
        return plan, saved

    def _iter_after(self, state: _State) -> Iterator[tuple[Batch, _State]]:
        return _iter_batches(self._plan, state)


def _check_ranks(shards: Sequence[Path], world_size: int) -> None:
    """Open shards until one has a row group for each rank: usually the first."""
    most = 0
    for path in shards:
        with Shard(path) as shard:
            most = max(most, shard.num_row_groups)
        if most >= world_size:
            return
    directory = shards[0].parent
    if most == 0:
        raise DataError(f"no documents in {directory}: {MAKE_DATA}")
    raise DataError(
        f"{world_size} ranks cannot share the shards in {directory}: none has more than {most} "
        f"row groups, so a rank would get nothing. Use at most {most} ranks, or build them again "
        f"with a smaller --documents-per-row-group"
    )


def _names_and_sizes(shards: Sequence[Path]) -> list[list[Any]]:
    try:
        return [[path.name, path.stat().st_size] for path in shards]
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; {MAKE_DATA}") from error


def _iter_batches(plan: _Plan, state: _State) -> Iterator[tuple[Batch, _State]]:
    """Yield each batch after `state` with the state after it."""
    identity, best_fit = plan.identity, plan.identity["packing"] == "best-fit"
    packer: BestFitPacker | ConcatPacker = ConcatPacker(identity["sequence_length"] + 1)
    if best_fit:
        packer = BestFitPacker(identity["sequence_length"] + 1, identity["buffer_size"])
    dtype = np.uint16 if plan.tokenizer.vocab_size <= 1 << 16 else np.uint32
    for document in state.documents:
        packer.add(document.rest(), document.length)
    # The order decides what concat does, so no document has to wait for others.
    size = identity["tokenizer_batch"] if best_fit else plan.num_threads
    chunks = _iter_chunks(plan, state, size)
    position, next_document, usage = state.position, state.next_document, state.usage
    epochs = _build_meter(plan)
    rows: list[Row] = []
    while True:
        while packer.needs_documents():
            position, next_document, texts = next(chunks)
            for ids in plan.tokenizer.encode_batch(texts, plan.num_threads):
                packer.add(np.array(ids, dtype))
        if (row := packer.place()) is not None:
            rows.append(row)
        if len(rows) == identity["batch_size"]:
            tokens, documents = np.stack(rows), packer.documents()  # (B, T + 1)
            rows = []
            batch = Batch(np.stack((tokens[:, :-1], tokens[:, 1:])))
            usage = Usage(
                epochs(position, next_document, len(documents) if best_fit else 0),
                usage.used + tokens.size,
                state.usage.dropped + packer.dropped,
            )
            yield batch, _State(position, next_document, documents, usage)


def _build_meter(plan: _Plan) -> Callable[[Position, int, int], float]:
    """Return what tells the passes at a position, less waiting documents, by the shards' sizes."""
    sizes = [size for _, size in plan.identity["shards"]]
    starts = [0, *accumulate(sizes)]

    @lru_cache(maxsize=1)
    def documents_before(index: int) -> list[int]:
        with Shard(plan.shards[index]) as shard:
            return [0, *accumulate(shard.documents_per_row_group)]

    def epochs(position: Position, next_document: int, waiting: int) -> float:
        documents = documents_before(position.shard)
        mean_size = sizes[position.shard] / documents[-1]
        read = documents[position.row_group] + next_document
        read -= waiting * plan.identity["world_size"]
        done = starts[position.shard] + mean_size * read
        return float(max(0.0, position.epoch - 1 + done / starts[-1]))

    return epochs


def _iter_chunks(
    plan: _Plan, state: _State, size: int
) -> Iterator[tuple[Position, int, list[str]]]:
    """Yield this rank's documents after `state` in chunks, each with its position and end."""
    rank, world_size = plan.identity["rank"], plan.identity["world_size"]
    position, skip = state.position, state.next_document
    while True:
        whole_epoch = (position.shard, position.row_group, skip) == (0, rank, 0)
        empty = True
        for index in range(position.shard, len(plan.shards)):
            with Shard(plan.shards[index]) as shard:
                for row_group in range(position.row_group, shard.num_row_groups, world_size):
                    texts = shard.read_row_group(row_group)
                    position = Position(index, row_group, position.epoch)
                    for start in range(skip, len(texts), size):
                        end = min(start + size, len(texts))
                        empty = False
                        yield position, end, texts[start:end]
                    skip = 0
            position, skip = replace(position, row_group=rank), 0
        if whole_epoch and empty:
            raise DataError(
                f"rank {rank} of {world_size} finds no document in the shards in "
                f"{plan.shards[0].parent}: use fewer ranks, or {MAKE_DATA}"
            )
        position = Position(0, rank, position.epoch + 1)
