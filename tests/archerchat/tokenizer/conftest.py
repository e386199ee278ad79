"""Two tokenizers for the tests: the reference's, and a small one that needs no `../shared`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from archerchat.tokenizer.bpe import Tokenizer, load_ranks, train_tokenizer


@pytest.fixture(scope="session")
def reference_tokenizer(oracle_dir: Path) -> Tokenizer:
    """The reference's tokenizer, from its own ranks and pattern."""
    settings = json.loads((oracle_dir / "tokenizer" / "tokenizer.json").read_text())
    ranks = load_ranks(oracle_dir / "tokenizer" / "mergeable_ranks.tiktoken")
    return Tokenizer(ranks, pattern=settings["pattern"])


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    """290 ids, learned from one sentence."""
    return train_tokenizer(["the cat sat on the mat with the other cat, and then it ran"] * 3, 290)
