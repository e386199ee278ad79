"""Turn text shards into training batches, ahead of the step and resumable exactly (SPEC section 4).

A background thread reads row groups, tokenizes 128 documents at a time and packs them, so that
the training step finds its batch ready; `TokenLoader.wait_seconds` says how long it did not.
Each batch travels with the state that the loader had after making it: a tuple of references,
turned into arrays only when a checkpoint asks. `state()` is therefore that of the last batch
the caller got, however far the thread has run ahead.

    loader = TokenLoader(train_shards, tokenizer, batch_size=8, sequence_length=256)
    batch = next(loader)  # batch.inputs, batch.targets: (B, T)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from archerchat.data.packing import Packing, Row, build_packer
from archerchat.data.prefetch import PrefetchingLoader, check_sizes
from archerchat.data.shards import MAKE_DATA, Shard
from archerchat.data.state import LoaderIdentity, LoaderState, Position
from archerchat.errors import CheckpointError, DataError

__all__ = ["Batch", "DocumentTokenizer", "LoaderState", "Position", "TokenLoader"]


class DocumentTokenizer(Protocol):
    """What the loader needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def encode_batch(
        self, texts: Sequence[str], *, prepend_bos: bool = ..., num_threads: int = ...
    ) -> list[list[int]]: ...


@dataclass(frozen=True, eq=False)
class Batch:
    """Hold B rows of T tokens and, one position on, the tokens to predict."""

    inputs: NDArray[np.int64]
    """(B, T)"""
    targets: NDArray[np.int64]
    """(B, T)"""
    position: Position
    """the last chunk that entered the buffer when this batch was made"""


@dataclass(frozen=True)
class _Plan:
    """What the thread needs; it must not refer to the loader, or that is never collected."""

    identity: LoaderIdentity
    shards: tuple[Path, ...]
    tokenizer: DocumentTokenizer
    num_threads: int


class TokenLoader(PrefetchingLoader[Batch, LoaderState]):
    """Iterate over batches of packed tokens, epoch after epoch, without end.

    Rank r of W reads row groups r, r + W, ... of each shard. An empty text is a document too:
    a lone BOS. The thread starts at the first `next` and stops with `close`.

    Args:
        shards: what to read, in this order.
        batch_size: rows in a batch, B.
        sequence_length: tokens in a row, T.
        packing: `best-fit` drops what does not fit, `concat` goes on in the next row.
        buffer_size: documents that best fit chooses from.
        tokenizer_batch: documents that enter the buffer together, never across row groups.
        prefetch: batches prepared ahead.
        num_threads: threads that tokenize.

    Raises:
        UsageError: a size is not positive, or the rank is not one of `world_size`.
        DataError: a shard is missing or broken (from the constructor or from `next`), or no
            shard has a row group for each rank.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        tokenizer: DocumentTokenizer,
        *,
        batch_size: int,
        sequence_length: int,
        rank: int = 0,
        world_size: int = 1,
        packing: Packing = "best-fit",
        buffer_size: int = 1000,
        tokenizer_batch: int = 128,
        prefetch: int = 4,
        num_threads: int = 1,
    ) -> None:
        sizes = {
            "batch size": batch_size,
            "sequence length": sequence_length,
            "buffer size": buffer_size,
            "tokenizer batch": tokenizer_batch,
            "prefetch depth": prefetch,
            "thread count": num_threads,
        }
        check_sizes(sizes, rank, world_size)
        _check_ranks(shards, world_size)
        identity = LoaderIdentity(
            packing=packing,
            batch_size=batch_size,
            sequence_length=sequence_length,
            buffer_size=buffer_size,
            tokenizer_batch=tokenizer_batch,
            rank=rank,
            world_size=world_size,
            tokenizer=tokenizer.fingerprint,
            shards=_names_and_sizes(shards),
        )
        super().__init__(LoaderState(identity, Position(0, rank, 1), 0, ()), prefetch)
        self._given = _Plan(identity, tuple(shards), tokenizer, num_threads)
        self._plan = self._given

    def _iter_after(self, state: LoaderState) -> Iterator[tuple[Batch, LoaderState]]:
        return _iter_batches(self._plan, state)

    def restore(self, state: LoaderState, *, extend: bool = False) -> None:
        """Go on from `state`: the next batch is the one that followed it.

        Shards that the loader was given and the saved one was not, such as those downloaded since,
        are left out, so that the batches stay the same.

        Args:
            extend: go on into shards that follow the saved ones instead of leaving them out, and
                allow another batch size; rows are whole between batches.

        Raises:
            CheckpointError: this loader would not yield the same batches, and why.
        """
        plan, saved = self._given, state.identity
        if extend:
            known = saved.shards == plan.identity.shards[: len(saved.shards)]
            shards = plan.identity.shards if known else saved.shards
            saved = replace(saved, shards=shards, batch_size=plan.identity.batch_size)
        else:
            plan = _narrow(plan, saved.shards)
        if differences := saved.differences(plan.identity):
            raise CheckpointError(
                f"the data loader cannot resume: {'; '.join(differences)}. Restore the old "
                f"setting or data, or start a new run"
            )
        self.close()
        self._plan, self._state = plan, replace(state, identity=saved)


def _narrow(plan: _Plan, shards: tuple[tuple[str, int], ...]) -> _Plan:
    """Return the plan that reads only `shards`, names and sizes, if `plan` has them all."""
    paths = dict(zip(plan.identity.shards, plan.shards, strict=True))
    if not paths.keys() >= set(shards):
        return plan
    identity = replace(plan.identity, shards=shards)
    return replace(plan, identity=identity, shards=tuple(paths[shard] for shard in shards))


def _check_ranks(shards: Sequence[Path], world_size: int) -> None:
    """Open shards until one has a row group for each rank: usually the first."""
    if not shards:
        raise DataError(f"the loader was given no shards: {MAKE_DATA}")
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


def _names_and_sizes(shards: Sequence[Path]) -> tuple[tuple[str, int], ...]:
    try:
        return tuple((path.name, path.stat().st_size) for path in shards)
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; {MAKE_DATA}") from error


def _iter_batches(plan: _Plan, state: LoaderState) -> Iterator[tuple[Batch, LoaderState]]:
    """Yield each batch after `state` with the state after it."""
    identity = plan.identity
    packer = build_packer(identity.packing, identity.sequence_length + 1, identity.buffer_size)
    dtype = np.uint16 if plan.tokenizer.vocab_size <= 1 << 16 else np.uint32
    for document in state.documents:
        packer.add(document)
    chunks = _iter_chunks(plan, state)
    position, next_document = state.position, state.next_document
    rows: list[Row] = []
    while True:
        while packer.needs_documents():
            position, next_document, texts = next(chunks)
            for ids in plan.tokenizer.encode_batch(
                texts, prepend_bos=True, num_threads=plan.num_threads
            ):
                packer.add(np.array(ids, dtype))
        if (row := packer.place()) is not None:
            rows.append(row)
        if len(rows) == identity.batch_size:
            stacked = np.stack(rows)  # (B, T + 1)
            rows = []
            batch = Batch(
                np.ascontiguousarray(stacked[:, :-1]),
                np.ascontiguousarray(stacked[:, 1:]),
                position,
            )
            yield batch, LoaderState(identity, position, next_document, packer.documents())


def _iter_chunks(plan: _Plan, state: LoaderState) -> Iterator[tuple[Position, int, list[str]]]:
    """Yield this rank's documents after `state` in chunks, each with its position and end."""
    identity, size = plan.identity, plan.identity.tokenizer_batch
    position, skip = state.position, state.next_document
    while True:
        whole_epoch = (position.shard, position.row_group, skip) == (0, identity.rank, 0)
        empty = True
        for index in range(position.shard, len(plan.shards)):
            with Shard(plan.shards[index]) as shard:
                for row_group in range(
                    position.row_group, shard.num_row_groups, identity.world_size
                ):
                    texts = shard.read_row_group(row_group)
                    position = Position(index, row_group, position.epoch)
                    for start in range(skip, len(texts), size):
                        end = min(start + size, len(texts))
                        empty = False
                        yield position, end, texts[start:end]
                    skip = 0
            position, skip = replace(position, row_group=identity.rank), 0
        if whole_epoch and empty:
            raise DataError(
                f"rank {identity.rank} of {identity.world_size} finds no document in the shards "
                f"in {plan.shards[0].parent}: use fewer ranks, or {MAKE_DATA}"
            )
        position = Position(0, identity.rank, position.epoch + 1)
