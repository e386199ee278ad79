"""Tokenizers and a small corpus for the tests of the data path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from archerchat.data.shards import write_shards
from archerchat.tokenizer.bpe import Tokenizer, load_ranks


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """One token a byte, so that token counts can be read off the text; BOS is 256."""
    return Tokenizer({bytes([value]): value for value in range(256)})


@pytest.fixture(scope="session")
def golden_tokenizer(oracle_dir: Path) -> Tokenizer:
    """The tokenizer of the reference's goldens."""
    settings = json.loads((oracle_dir / "tokenizer" / "tokenizer.json").read_text())
    ranks = load_ranks(oracle_dir / "tokenizer" / "mergeable_ranks.tiktoken")
    return Tokenizer(ranks, pattern=settings["pattern"])


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three shards of 60, 60 and 50 documents of 0 .. 36 bytes, row groups of 8."""
    documents = [f"{i}:" + "abcdefgh" * (i % 5) if i % 17 else "" for i in range(170)]
    directory = tmp_path_factory.mktemp("corpus")
    return write_shards(documents, directory, documents_per_row_group=8, documents_per_shard=60)
