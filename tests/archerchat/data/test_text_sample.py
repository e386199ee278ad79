"""What a sample says of a source: its tokens, and what best fit keeps of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from archerchat.data.shards import write_shards
from archerchat.data.text_sample import TextSample, measure_text, simulate_best_fit
from archerchat.tokenizer.bpe import Tokenizer


def test_a_sample_tells_the_tokens_of_all_shards(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    texts = [f"{i:04d}" * (1 + i % 3) for i in range(4000)]
    shards = write_shards(texts, tmp_path / "many", documents_per_shard=250)
    tokens = sum(len(text) + 1 for text in texts)
    assert measure_text(shards, byte_tokenizer, 65).tokens == pytest.approx(tokens, rel=0.05)
    long = write_shards(["ab" * 9000, "c"], tmp_path / "long")  # only the beginning is tokenized
    assert measure_text(long, byte_tokenizer, 65).tokens == 18_003


def test_short_documents_are_kept_and_long_ones_are_not() -> None:
    assert simulate_best_fit([1, 5, 10, 20], 65) > 0.99
    assert simulate_best_fit([1000], 65) == pytest.approx(0.065)
    # One long document in ten ends up filling the buffer, and then nothing else is chosen from.
    assert simulate_best_fit([*[20] * 9, 1000], 65) < 0.3
    assert TextSample(1, 0.9).packing == "best-fit"
    assert TextSample(1, 0.89).packing == "concat"


def test_passes_are_over_what_the_packing_keeps() -> None:
    sample = TextSample(tokens=1000, kept=0.5)
    assert (sample.passes(1500, "best-fit"), sample.passes(1500, "concat")) == (3, 1.5)
    assert sample.describe(400, "concat") == (
        "about 1,000 tokens; 0.40 passes, 40.0% of the text in rows"
    )
    assert "3.00 passes, 50.0% of the text in rows. Warning" in sample.describe(1500, "best-fit")
