"""Turn text shards into training batches, ahead of the step and resumable exactly (SPEC section 4).

The reference saves a position only, and loses the documents that its packer had buffered (1,041 in
the golden). Here a state is the position, the buffered documents, and the identity of shards,
tokenizer and settings, which a resumed loader must share.

    loader = TextLoader(train_shards, tokenizer, batch_size=8, sequence_length=256)
    batch = next(loader)  # batch.inputs, batch.targets: (B, T)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np

from archerchat.data.packing import BUFFER_SIZE, BestFitPacker, ConcatPacker, Packing, Row
from archerchat.data.prefetch import Batch, PrefetchingLoader, State, stack_rows
from archerchat.data.shards import MAKE_DATA, Shard
from archerchat.errors import DataError
from archerchat.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class Position:
    """Place, in indices, of the last chunk of documents that entered the packer's buffer."""

    shard: int
    row_group: int
    epoch: int
    """From 1."""


@dataclass(frozen=True)
class Usage:
    """How much of the text the batches so far have used."""

    epochs: float = 0.0
    """Passes over it, without the documents in the buffer."""
    used: int = 0
    """Tokens in all rows; repeated ones count again."""
    dropped: int = 0
    """Tokens that packing cut off."""

    @property
    def text_share(self) -> float:
        """Approximate share of the text that has been in a row; repetitions count once."""
        return min(1.0, self.epochs) * self.used / max(1, self.used + self.dropped)


@dataclass(frozen=True)
class _Progress:
    position: Position
    next_document: int = 0
    """Number of documents of the position's row group that have been read."""
    usage: Usage = Usage()


class TextLoader(PrefetchingLoader[_Progress]):
    """Iterate over batches of packed tokens, epoch after epoch, without end.

    Rank r of W reads row groups r, r + W, ... of each shard. An empty text is a single BOS.

    Args:
        batch_size, sequence_length: rows per batch, B, and tokens per row, T.
        tokenizer_batch: documents that enter the buffer together, never across row groups.
        extend: continue a saved state with shards that follow the saved ones. By default shards
            that the saved state does not name, such as those downloaded since, are ignored.

    Raises:
        DataError: a shard is broken (also from `next`), or none has a row group for each rank.
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
        extend: bool = False,
    ) -> None:
        assert min(batch_size, sequence_length, buffer_size, tokenizer_batch, prefetch) >= 1
        assert 0 <= rank < world_size
        identity: dict[str, Any] = {
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "buffer_size": buffer_size,
            "tokenizer_batch": tokenizer_batch,
            "packing": packing,
            "rank": rank,
            "world_size": world_size,
            "tokenizer": tokenizer.fingerprint,
            "shards": _describe_shards(shards, world_size),
        }
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        super().__init__(identity, _Progress(Position(0, rank, 1)), prefetch, dtype)
        self._given, self._shards = identity, list(shards)
        self._rank, self._world_size = rank, world_size
        self._tokenizer, self._extend = tokenizer, extend
        self._documents_before: dict[int, list[int]] = {}
        """For the last shard that was read: documents before each of its row groups."""

    @property
    def usage(self) -> Usage:
        return self._state.progress.usage

    def _parse(self, state: Mapping[str, Any]) -> _Progress:
        return _Progress(
            Position(**state["position"]),
            int(state["next_document"]),
            Usage(**state.get("usage", {})),  # older checkpoints have none
        )

    def _reconcile(self, saved: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
        now, known = self._given, saved.get("shards", [])
        if self._extend:
            if known == now["shards"][: len(known)]:
                saved["shards"] = now["shards"]
        elif set(map(tuple, known)) <= set(map(tuple, now["shards"])):
            now = {**now, "shards": known}
        return saved, now

    def _iter_after(self, state: State[_Progress]) -> Iterator[tuple[Batch, State[_Progress]]]:
        settings, paths = self._identity, {path.name: path for path in self._shards}
        self._shards = [paths[name] for name, _ in settings["shards"]]
        self._sizes = [size for _, size in settings["shards"]]
        row_length = settings["sequence_length"] + 1
        self._packer: BestFitPacker | ConcatPacker
        if settings["packing"] == "best-fit":
            self._packer = BestFitPacker(row_length, settings["buffer_size"])
            self._chunk = settings["tokenizer_batch"]
        else:  # the order decides, so no document has to wait for others
            self._packer, self._chunk = ConcatPacker(row_length), 1
        for document in state.documents:
            self._packer.add(document.rest(), document.length)
        self._progress, dropped_before = state.progress, state.progress.usage.dropped
        for rows in stack_rows(self._iter_rows(), settings["batch_size"]):  # (B, T + 1)
            used = self._progress.usage.used + rows.size
            usage = Usage(self._measure_epochs(), used, dropped_before + self._packer.dropped)
            self._progress = replace(self._progress, usage=usage)
            batch = Batch(np.stack((rows[:, :-1], rows[:, 1:])))
            yield batch, State(self._progress, self._packer.documents())

    def _iter_rows(self) -> Iterator[Row]:
        chunks = self._iter_chunks()
        while True:
            while self._packer.needs_documents():
                for ids in self._tokenizer.encode_batch(next(chunks)):
                    self._packer.add(np.array(ids, self._dtype))
            if (row := self._packer.place()) is not None:
                yield row

    def _iter_chunks(self) -> Iterator[list[str]]:
        """Yield this rank's documents, in lists to tokenize together."""
        skip = self._progress.next_document
        for position, texts in self._iter_row_groups(self._progress.position):
            for start in range(skip, len(texts), self._chunk):
                chunk = texts[start : start + self._chunk]
                end = start + len(chunk)
                self._progress = replace(self._progress, position=position, next_document=end)
                yield chunk
            skip = 0

    def _iter_row_groups(self, first: Position) -> Iterator[tuple[Position, list[str]]]:
        """Yield this rank's row groups from `first` on, epoch after epoch."""
        first_shard, first_group = first.shard, first.row_group
        for epoch in count(first.epoch):
            num_documents = 0
            for index in range(first_shard, len(self._shards)):
                with Shard(self._shards[index]) as shard:
                    for group in range(first_group, shard.num_row_groups, self._world_size):
                        texts = shard.read_row_group(group)
                        num_documents += len(texts)
                        yield Position(index, group, epoch), texts
                first_group = self._rank
            first_shard = 0
            if not num_documents and epoch > first.epoch:
                raise DataError(
                    f"rank {self._rank} of {self._world_size} finds no document in the shards in "
                    f"{self._shards[0].parent}: use fewer ranks, or {MAKE_DATA}"
                )

    def _measure_epochs(self) -> float:
        """Return the passes over the text, by the shards' sizes, without the buffer's documents."""
        position = self._progress.position
        if position.shard not in self._documents_before:
            with Shard(self._shards[position.shard]) as shard:
                before = [0, *accumulate(shard.documents_per_row_group)]
            self._documents_before = {position.shard: before}
        before = self._documents_before[position.shard]
        read = before[position.row_group] + self._progress.next_document
        if isinstance(self._packer, BestFitPacker):
            read -= len(self._packer) * self._world_size
        mean_size = self._sizes[position.shard] / before[-1]
        done = sum(self._sizes[: position.shard]) + mean_size * read
        return float(max(0.0, position.epoch - 1 + done / sum(self._sizes)))


def _describe_shards(shards: Sequence[Path], world_size: int) -> list[list[Any]]:
    """Return names and sizes, after checking that some shard has a row group for each rank."""
    most, directory = 0, shards[0].parent
    for path in shards:
        with Shard(path) as shard:
            most = max(most, shard.num_row_groups)
        if most >= world_size:
            break
    else:
        if most == 0:
            raise DataError(f"no documents in {directory}: {MAKE_DATA}")
        raise DataError(
            f"{world_size} ranks cannot share the shards in {directory}: none has more than {most} "
            f"row groups. Use at most {most} ranks, or build the data again with a smaller "
            "--documents-per-row-group"
        )
    try:
        return [[path.name, path.stat().st_size] for path in shards]
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; {MAKE_DATA}") from error
