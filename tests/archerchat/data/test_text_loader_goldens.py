"""The loader against the reference's: every batch and position of `dataloader_goldens.json`."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archerchat.data.prefetch import Batch
from archerchat.data.shards import iter_documents, list_shards, split_shards
from archerchat.data.text_loader import Position, TextLoader
from archerchat.tokenizer.bpe import Tokenizer

Goldens = dict[str, Any]


@pytest.fixture(scope="module")
def goldens(oracle_dir: Path) -> Goldens:
    loaded: Goldens = json.loads((oracle_dir / "dataloader_goldens.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def splits(oracle_dir: Path) -> dict[str, list[Path]]:
    train, validation = split_shards(list_shards(oracle_dir / "corpus"))
    return {"train": train, "val": validation}


class CachedTokenizer:
    """Encode each document once, however many tests read it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bos_id = tokenizer.bos_id
        self.vocab_size = tokenizer.vocab_size
        self.fingerprint = tokenizer.fingerprint
        self.encode = functools.cache(lambda text: [self.bos_id, *tokenizer.encode(text)])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


@pytest.fixture(scope="module")
def tokenizer(golden_tokenizer: Tokenizer) -> CachedTokenizer:
    return CachedTokenizer(golden_tokenizer)


def digest(batch: Batch) -> str:
    return hashlib.sha256(
        batch.inputs.astype("<i8").tobytes() + batch.targets.astype("<i8").tobytes()
    ).hexdigest()


def position_of(loader: TextLoader) -> Position:
    """Where the loader was after the last batch that it returned."""
    return Position(**loader.state_dict()["position"])


def check(loader: TextLoader, batch: Batch, golden: Goldens) -> None:
    position = position_of(loader)
    assert {
        "pq_idx": position.shard,
        "rg_idx": position.row_group,
        "epoch": position.epoch,
    } == golden["state"]
    assert digest(batch) == golden["sha256"]
    if "inputs" in golden:
        np.testing.assert_array_equal(batch.inputs, golden["inputs"])
        np.testing.assert_array_equal(batch.targets, golden["targets"])


@pytest.mark.parametrize(
    ("name", "split", "options"),
    [
        ("train_ws1", "train", {}),
        ("val_ws1", "val", {}),
        ("train_ws2_rank0", "train", {"rank": 0, "world_size": 2}),
        ("train_ws2_rank1", "train", {"rank": 1, "world_size": 2}),
        ("val_ws2_rank0", "val", {"rank": 0, "world_size": 2}),
        ("val_ws2_rank1", "val", {"rank": 1, "world_size": 2}),
        ("train_ws1_buffer100", "train", {"buffer_size": 100}),
        ("train_ws1_T512_B2", "train", {"batch_size": 2, "sequence_length": 512}),
    ],
)
def test_every_batch_is_the_references(
    name: str,
    split: str,
    options: dict[str, int],
    goldens: Goldens,
    splits: dict[str, list[Path]],
    tokenizer: CachedTokenizer,
) -> None:
    settings = {"batch_size": 4, "sequence_length": 256} | options
    with TextLoader(splits[split], tokenizer, **settings) as loader:  # type: ignore[arg-type]
        for golden in goldens[name]:
            check(loader, next(loader), golden)


@pytest.mark.slow
def test_a_long_run_goes_on_into_the_second_epoch(
    goldens: Goldens, splits: dict[str, list[Path]], tokenizer: CachedTokenizer
) -> None:
    expected = {golden["index"]: golden for golden in goldens["train_ws1_B8_long"]["batches"]}
    first_of_second_epoch = None
    with TextLoader(splits["train"], tokenizer, batch_size=8, sequence_length=256) as loader:
        for index in range(1100):
            batch = next(loader)
            if index in expected:
                check(loader, batch, expected.pop(index))
            if first_of_second_epoch is None and position_of(loader).epoch == 2:
                first_of_second_epoch = index
    assert not expected
    golden_first = goldens["train_ws1_B8_long"]["first_batch_index_with_state_epoch_2"]
    assert first_of_second_epoch == golden_first


def test_resume_loses_nothing_where_the_reference_loses_1041_documents(
    goldens: Goldens, splits: dict[str, list[Path]], tokenizer: CachedTokenizer
) -> None:
    lost = goldens["resume_after_batch_index_29"]["skipped"]
    with TextLoader(splits["train"], tokenizer, batch_size=4, sequence_length=256) as loader:
        for golden in goldens["train_ws1"][:30]:
            check(loader, next(loader), golden)
        state = loader.state_dict()
        # What the reference forgets at this point is exactly what our state carries.
        assert len(state["lengths"]) == lost["docs_in_buffer"] == 1041
        assert state["lengths"].sum() == lost["tokens_in_buffer"]
    with TextLoader(splits["train"], tokenizer, batch_size=4, sequence_length=256) as resumed:
        resumed.load_state_dict(state)
        for golden in goldens["train_ws1"][30:]:
            check(resumed, next(resumed), golden)


@pytest.mark.parametrize("case", range(8))
def test_best_fit_drops_what_the_reference_drops(
    case: int, goldens: Goldens, splits: dict[str, list[Path]], tokenizer: CachedTokenizer
) -> None:
    golden = goldens["cropping_waste"][case]
    batch_size, length = golden["B"], golden["T"]
    with TextLoader(
        splits["train"],
        tokenizer,
        batch_size=batch_size,
        sequence_length=length,
        buffer_size=golden["buffer_size"],
    ) as loader:
        batches = 1
        while next(loader) and position_of(loader).epoch == 1:
            batches += 1
        state = loader.state_dict()
    # The second epoch has begun with one chunk: all train documents and 128 more were tokenized.
    assert (Position(**state["position"]), state["next_document"]) == (Position(0, 0, 2), 128)
    lengths = [len(tokenizer.encode(text)) for text in iter_documents(splits["train"])]
    tokenized = sum(lengths) + sum(lengths[:128])
    buffered = int(state["lengths"].sum())
    rows = batches * batch_size * (length + 1)
    assert state["usage"]["dropped"] == tokenized - buffered - rows
    assert {
        "T": length,
        "buffer_size": golden["buffer_size"],
        "B": batch_size,
        "batches_until_first_epoch_2": batches,
        "tokens_tokenized": tokenized,
        "tokens_left_in_buffer": buffered,
        "docs_in_buffer": len(state["lengths"]),
        "tokens_in_rows": rows,
        "dropped_fraction": 1 - rows / (tokenized - buffered),
    } == golden


def test_concat_yields_every_token_of_an_epoch_in_order(
    splits: dict[str, list[Path]], tokenizer: CachedTokenizer
) -> None:
    expected = [
        token for text in iter_documents(splits["val"]) for token in tokenizer.encode(text)[1:]
    ]
    seen: list[int] = []
    with TextLoader(
        splits["val"], tokenizer, batch_size=4, sequence_length=256, packing="concat"
    ) as loader:
        for batch in loader:
            assert (batch.inputs[:, 0] == tokenizer.bos_id).all()
            seen += batch.targets[batch.targets != tokenizer.bos_id].tolist()
            if len(seen) >= len(expected):
                break
    assert seen[: len(expected)] == expected
