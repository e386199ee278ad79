"""Prompts in batches, after a shared prefix or none, have the logits of plain forward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from archerchat.inference.model_runner import MIN_FILLED, Prefill, iter_batches
from archerchat.model.transformer import Transformer

Prompt = Callable[[int], list[int]]


@torch.no_grad()
def plain(model: Transformer, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]))[0]


def logits(ran: Prefill, row: int) -> torch.Tensor:
    return ran.model.logits(ran.hidden[row, : ran.lengths[row]])


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_padding_changes_nothing(model: Transformer, prompt: Prompt) -> None:
    rows = [prompt(n) for n in (1, 2, 50, 200, 300)]
    ran = Prefill(model, rows)
    for i, row in enumerate(rows):
        expected = plain(model, row)
        close(logits(ran, i), expected)
        close(ran.last_logits[i], expected[-1])


@pytest.mark.parametrize("shared", [1, 64, 128, 129, 200, 300])
def test_continuations_of_a_prefix(model: Transformer, prompt: Prompt, shared: int) -> None:
    """Longer than both windows, too; and a prefix after a prefix."""
    begin = prompt(shared)
    first = Prefill(model, [begin]).prefix(0)
    assert first.length == shared
    windows = model.config.windows
    assert [keys.size(1) for keys, _ in first.layers] == [min(w, shared) for w in windows]
    tails = [prompt(n) for n in (1, 20, 90)]
    ran = Prefill(model, tails, first)
    for i, tail in enumerate(tails):
        close(logits(ran, i), plain(model, begin + tail)[shared:])
    second = ran.prefix(2)
    assert second.length == shared + 90
    last = prompt(7)
    expected = plain(model, begin + tails[2] + last)[-7:]
    close(logits(Prefill(model, [last], second), 0), expected)


def test_the_logits_are_the_references(model_golden: Any) -> None:
    model, io = model_golden.build().requires_grad_(False), model_golden.io
    ids = io["ids"].tolist()
    begin = Prefill(model, [ids[0][:100]]).prefix(0)
    positions = [int(p) for p in io["logits_positions"] if p >= 100]
    wanted = io["logits_row0"][-len(positions) :]
    found = logits(Prefill(model, [ids[0][100:]], begin), 0)
    close(found[[p - 100 for p in positions]], wanted)
    long = io["long_ids_400"][0].tolist()
    middle = Prefill(model, [long[:300]]).prefix(0)
    late = [(i, int(p)) for i, p in enumerate(io["long_logits_pos"]) if p >= 300]
    assert late
    got = logits(Prefill(model, [long[300:]], middle), 0)[[p - 300 for _, p in late]]
    close(got, io["long_logits"][[i for i, _ in late]])


def test_a_row_without_tokens_is_refused(model: Transformer) -> None:
    for rows in ([], [[]], [[1], []]):
        with pytest.raises(AssertionError, match="needs a token"):
            Prefill(model, rows)


@given(st.lists(st.integers(0, 300), max_size=40), st.integers(1, 1000))
def test_batches_hold_similar_lengths_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(iter_batches(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
        assert min(lengths[i] for i in batch) >= MIN_FILLED * longest
