"""A loader's state survives JSON and arrays, and says what no longer matches."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from archerchat.data.state import LoaderIdentity, LoaderState, Position
from archerchat.errors import CheckpointError

IDENTITY = LoaderIdentity(
    packing="best-fit",
    batch_size=8,
    sequence_length=256,
    buffer_size=1000,
    tokenizer_batch=128,
    rank=0,
    world_size=2,
    tokenizer="abc",
    shards=(("shard_00000.parquet", 10), ("shard_00001.parquet", 20)),
)


def build_state(*lengths: int) -> LoaderState:
    documents = tuple(np.arange(length, dtype=np.uint16) + length for length in lengths)
    return LoaderState(IDENTITY, Position(1, 2, 3), 128, documents)


@pytest.mark.parametrize("lengths", [(), (1,), (5, 1, 9)])
def test_parts_hold_everything(lengths: tuple[int, ...]) -> None:
    state = build_state(*lengths)
    value, arrays = state.to_parts()
    assert arrays["tokens"].dtype == np.uint16
    again = LoaderState.from_parts(json.loads(json.dumps(value)), arrays)
    assert (again.identity, again.position, again.next_document) == (
        state.identity,
        state.position,
        state.next_document,
    )
    assert [d.tolist() for d in again.documents] == [d.tolist() for d in state.documents]
    assert all(document.dtype == np.uint16 for document in again.documents)


def test_broken_parts_are_refused() -> None:
    value, arrays = build_state(5, 1).to_parts()
    for broken in (
        ({**value, "position": {"shard": 0}}, arrays),
        ({"identity": value["identity"]}, arrays),
        (value, {"tokens": arrays["tokens"]}),
        (value, {**arrays, "tokens": arrays["tokens"][:-1]}),
        (value, {**arrays, "lengths": np.array([6, 0])}),
    ):
        with pytest.raises(CheckpointError, match=r"data loader is broken .*earlier checkpoint"):
            LoaderState.from_parts(*broken)


def test_differences_are_named_with_both_values() -> None:
    assert IDENTITY.differences(IDENTITY) == []
    now = replace(IDENTITY, batch_size=4, packing="concat", shards=IDENTITY.shards[:1])
    assert IDENTITY.differences(now) == [
        "packing was best-fit and is concat",
        "batch_size was 8 and is 4",
        "there were 2 shards and are 1, without shard_00001.parquet of 20 bytes",
    ]
    grown = replace(IDENTITY, shards=(("shard_00000.parquet", 11), ("shard_00001.parquet", 21)))
    assert IDENTITY.differences(grown) == [
        "shard shard_00000.parquet of 10 bytes is now shard_00000.parquet of 11 bytes "
        "(1 more differ)"
    ]
