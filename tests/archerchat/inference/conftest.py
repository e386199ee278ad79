"""Small models whose next tokens differ clearly, and the plain path that checks the engine."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch

from archerchat.inference.sequence import Completion, Request
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer

WINDOWED = ModelConfig(256, 100, 4, 4, 2, 32)
"""Short windows of 128, long ones of 256, grouped queries, a padded vocabulary."""


def random_model(
    config: ModelConfig = WINDOWED, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Transformer:
    """Return a frozen model with every parameter away from its special initial values."""
    model = Transformer(config, dtype, "matmul")
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            draw = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(draw.to(parameter.dtype))
    return model.requires_grad_(False)


@torch.no_grad()
def is_plain_greedy(model: Transformer, request: Request, completion: Completion) -> bool:
    """Say whether a greedy answer is what plain forward passes say, token for token.

    One pass over the whole row tells: what a causal model says at a position does not depend on
    what follows. A stop token must be the most likely one where the row ended by it.
    """
    answer = list(completion.token_ids)
    if completion.stop_token is not None:
        answer.append(completion.stop_token)
    hidden = model.hidden(torch.tensor([[*request.prompt, *answer]]))
    best = model.logits(hidden[0, len(request.prompt) - 1 : -1]).argmax(dim=-1).tolist()
    return best == answer and not set(completion.token_ids) & set(request.params.stop_token_ids)


@pytest.fixture(scope="session")
def build() -> Callable[..., Transformer]:
    return random_model


@pytest.fixture(scope="session")
def model() -> Transformer:
    """A model of `WINDOWED`'s shape."""
    return random_model()


@pytest.fixture(scope="session")
def is_plain() -> Callable[[Transformer, Request, Completion], bool]:
    return is_plain_greedy


@pytest.fixture
def prompt() -> Callable[[int], list[int]]:
    """Draw prompts of given lengths, the same ones in each run of a test."""
    random = Random(0)
    return lambda length: [random.randrange(100) for _ in range(length)]
