"""Measure a source's text by a sample: how many tokens it has, and which packing suits it.

Best fit drops what a crop cuts off: little of short texts at 2,048 tokens per row, nearly all of
books at 128. The lengths of a sample, put through the packer over and over, show the share that
best fit keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from archerchat.data.packing import BUFFER_SIZE, BestFitPacker, Packing
from archerchat.data.shards import Shard
from archerchat.tokenizer.bpe import Tokenizer

T = TypeVar("T")
MIN_KEPT = 0.9
"""Share of the text that best fit has to keep to be chosen."""
PLACES = 8
"""Row groups that the sample is taken from, each of another shard where there are as many."""
DOCUMENTS_PER_PLACE = 128
MAX_CHARACTERS = 4000
"""Characters of a document that are tokenized; the length of the rest is estimated from them."""
SIMULATED_DOCUMENTS = 50_000


@dataclass(frozen=True)
class TextSample:
    """What a sample says of a source's training text."""

    tokens: int
    """About how many tokens all of it has."""
    kept: float
    """Share of the tokens that best fit keeps."""

    @property
    def packing(self) -> Packing:
        """The packing that keeps most of the text, best fit where it keeps enough."""
        return "best-fit" if self.kept >= MIN_KEPT else "concat"

    def passes(self, tokens: int, packing: str) -> float:
        """Return how often training on `tokens` goes over the text."""
        kept = self.tokens * (self.kept if packing == "best-fit" else 1)
        return tokens / max(1, kept)

    def describe(self, tokens: int, packing: str) -> str:
        """Say how much text there is and how often training on `tokens` goes over it."""
        passes = self.passes(tokens, packing)
        share = min(1.0, passes) * (self.kept if packing == "best-fit" else 1)
        text = f"about {self.tokens:,} tokens; {passes:.2f} passes, {share:.1%} of the text in rows"
        if passes > 1:
            text += ". Warning: the text repeats; more text or fewer steps would avoid it"
        return text


def measure_text(shards: Sequence[Path], tokenizer: Tokenizer, row_length: int) -> TextSample:
    """Measure the text of `shards` for rows of `row_length`, T + 1, tokens.

    Raises:
        DataError: a shard cannot be read.
    """
    opened = _spread(shards, PLACES)
    lengths: list[int] = []
    num_documents = 0
    for path in opened:
        with Shard(path) as shard:
            num_documents += shard.num_documents
            for group in _spread(range(shard.num_row_groups), PLACES // len(opened)):
                texts = _spread(shard.read_row_group(group), DOCUMENTS_PER_PLACE)
                lengths += [_count_tokens(text, tokenizer) for text in texts]
    if not lengths:
        return TextSample(0, 1.0)
    size, size_opened = (sum(path.stat().st_size for path in each) for each in (shards, opened))
    tokens = sum(lengths) / len(lengths) * num_documents * size / size_opened
    return TextSample(round(tokens), simulate_best_fit(lengths, row_length))


def simulate_best_fit(lengths: Sequence[int], row_length: int) -> float:
    """Return the share that best fit keeps of documents that have these lengths again and again.

    Its buffer keeps what does not fit, so only the second half of many documents counts.
    """
    packer = BestFitPacker(row_length, BUFFER_SIZE)
    row, used, dropped = np.zeros(row_length, np.uint8), 0, 0
    for number, length in enumerate(islice(cycle(lengths), SIMULATED_DOCUMENTS)):
        if number == SIMULATED_DOCUMENTS // 2:
            used, dropped = 0, packer.dropped
        packer.add(row[:length], length)
        while not packer.needs_documents():
            used += row_length * (packer.place() is not None)
    return used / max(1, used + packer.dropped - dropped)


def _count_tokens(text: str, tokenizer: Tokenizer) -> int:
    start = text[:MAX_CHARACTERS]
    return 1 + round(len(tokenizer.encode(start)) * len(text) / max(1, len(start)))


def _spread(items: Sequence[T], count: int) -> Sequence[T]:
    """Return at most `count` of the items, evenly spaced."""
    return items[:: -(-len(items) // count) or 1]
