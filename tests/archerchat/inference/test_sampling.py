"""Plain generation: the reference's greedy continuations, and what the draws obey."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from archerchat.inference.sampling import choose_token, iter_tokens, next_token_logits
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Random weights large enough that tokens differ; 70 tokens padded to 128."""
    model = Transformer(ModelConfig(64, 70, 2, 2, 2, 32))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("prompt", ["prompt10", "prompt200"])
def test_greedy_continuations_are_the_references(model_golden: Any, prompt: str) -> None:
    golden = model_golden.facts["generation"][prompt]
    tokens = iter_tokens(model_golden.build(), golden["prompt"], 64, temperature=0)
    assert list(tokens) == golden["naive_greedy"]


def test_logits_are_the_models_at_the_last_position(model: Transformer) -> None:
    ids = [3, 1, 4, 1, 5]
    logits = next_token_logits(model, ids)
    assert logits.shape == (70,)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, model(torch.tensor([ids]))[0, -1].detach())


def test_a_seed_decides_the_draws(model: Transformer) -> None:
    first, again, other = (
        list(iter_tokens(model, [0], 20, generator=seeded(s))) for s in (1, 1, 2)
    )
    assert first == again != other
    assert len(first) == 20
    assert all(0 <= token < 70 for token in first)


def test_draws_do_not_touch_the_global_generator(model: Transformer) -> None:
    before = torch.get_rng_state()
    list(iter_tokens(model, [0], 5, generator=seeded(1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stop_token_ends_without_being_yielded(model: Transformer) -> None:
    tokens = list(iter_tokens(model, [0], 20, generator=seeded(1)))
    stop = tokens[7]
    until = list(iter_tokens(model, [0], 20, generator=seeded(1), stop_ids=(stop, 69)))
    assert until == tokens[: tokens.index(stop)]


def test_tokens_come_one_at_a_time(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    hidden = model.hidden

    def counted(ids: Tensor) -> Tensor:
        seen.append(ids.size(1))
        return hidden(ids)

    monkeypatch.setattr(model, "hidden", counted)
    tokens: Iterator[int] = iter_tokens(model, [0, 1], 20, temperature=0)
    assert seen == []
    next(tokens)
    next(tokens)
    assert seen == [2, 3]


LOGITS = torch.tensor([1.0, 3.0, 2.0, 3.0, -1.0, 0.5])


def shares(temperature: float, top_k: int | None = None, draws: int = 4000) -> Tensor:
    generator = seeded(5)
    tokens = [choose_token(LOGITS, temperature, top_k, generator) for _ in range(draws)]
    return torch.bincount(torch.tensor(tokens), minlength=6) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax_at_a_temperature(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(0)
    torch.testing.assert_close(shares(temperature), expected, atol=0.025, rtol=0)


def test_top_k_admits_the_most_likely_only() -> None:
    expected = LOGITS.masked_fill(LOGITS < 2, -torch.inf).softmax(0)
    torch.testing.assert_close(shares(1.0, top_k=3), expected, atol=0.025, rtol=0)
    torch.testing.assert_close(shares(1.0, top_k=600), LOGITS.softmax(0), atol=0.025, rtol=0)


def test_top_k_is_exact_among_equals() -> None:
    """bfloat16 logits are equal often."""
    assert (shares(1.0, top_k=1, draws=50) > 0).sum() == 1
    flat = torch.zeros(100)
    drawn = {choose_token(flat, 1.0, 5, seeded(seed)) for seed in range(200)}
    assert len(drawn) == 5


def test_no_temperature_takes_the_first_of_the_most_likely() -> None:
    assert choose_token(LOGITS, 0) == 1
    assert choose_token(LOGITS, 0, top_k=1, generator=seeded(0)) == 1


def test_a_low_temperature_stays_finite() -> None:
    assert choose_token(torch.tensor([15.0, -15.0, 14.0]), 0.001, None, seeded(0)) == 0
