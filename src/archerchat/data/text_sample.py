"""Estimate from a sample how many tokens a source has, and which packing suits it.

Best fit drops what a crop cuts off: little of short texts at 2,048 tokens per row, nearly all of
books at 128. Packing the sample's lengths again and again shows the share that best fit keeps.
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
"""Best fit is chosen if it keeps at least this share of the text."""
PLACES = 8
"""Number of row groups to sample from, in different shards if there are enough."""
DOCUMENTS_PER_PLACE = 128
MAX_CHARACTERS = 4000
"""Characters per document to tokenize; the number of tokens in the rest is estimated."""
SIMULATED_DOCUMENTS = 50_000


@dataclass(frozen=True)
class TextSample:
    """Estimates for a source's training text."""

    tokens: int
    kept: float
    """Share of the tokens that best fit keeps."""

    @property
    def packing(self) -> Packing:
        """Best fit if it keeps enough of the text, else concat."""
        return "best-fit" if self.kept >= MIN_KEPT else "concat"

    def passes(self, tokens: int, packing: str) -> float:
        """Return the passes over the text when training on `tokens`."""
        kept = self.tokens * (self.kept if packing == "best-fit" else 1)
        return tokens / max(1, kept)

    def describe(self, tokens: int, packing: str) -> str:
        """Describe the amount of text, and the passes over it when training on `tokens`."""
        passes = self.passes(tokens, packing)
        share = min(1.0, passes) * (self.kept if packing == "best-fit" else 1)
        text = f"about {self.tokens:,} tokens; {passes:.2f} passes, {share:.1%} of the text in rows"
        repeats = ". Warning: the text repeats; more text or fewer steps would avoid it"
        return text + (repeats if passes > 1 else "")


def measure_text(shards: Sequence[Path], tokenizer: Tokenizer, row_length: int) -> TextSample:
    """Measure the text of `shards` for rows of T + 1 tokens; a DataError if one is broken."""
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
    """Return the share that best fit keeps of documents with these lengths, repeated.

    The buffer collects documents that do not fit, so only the second half of many counts.
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
