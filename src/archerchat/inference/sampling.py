"""Continue a prompt, one token at a time, by the model's plain forward pass.

This is the reference against which a cached engine is checked: it runs the whole row again for
each token and needs nothing but the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from archerchat.model.loss import LOGIT_CAP
from archerchat.model.transformer import Transformer


@torch.no_grad()
def next_token_logits(model: Transformer, token_ids: Sequence[int]) -> Tensor:
    """Return the capped float32 logits (vocab_size,) that follow `token_ids`."""
    ids = torch.tensor([list(token_ids)], device=model.device)
    logits = model.unembedding(model.hidden(ids)[0, -1])[: model.config.vocab_size]
    capped: Tensor = LOGIT_CAP * torch.tanh(logits.float() / LOGIT_CAP)
    return capped


def choose_token(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """Draw a token from logits (vocab_size,); temperature 0 takes the most likely one.

    Args:
        top_k: only so many of the most likely tokens can be drawn.
        generator: on the CPU, where the draw is made whatever the model's device.
    """
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.cpu() / temperature
    if top_k is not None and top_k < scaled.numel():
        best = scaled.topk(top_k)
        scaled = torch.full_like(scaled, -torch.inf).scatter(0, best.indices, best.values)
    return int(torch.multinomial(scaled.softmax(dim=0), 1, generator=generator))


def iter_tokens(
    model: Transformer,
    prompt_ids: Sequence[int],
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Yield up to `max_tokens` token ids after `prompt_ids`; a stop token ends without a yield.

    Args:
        prompt_ids: at least one; usually BOS comes first.
    """
    token_ids = list(prompt_ids)
    assert token_ids, "a model needs one token to continue from"
    for _ in range(max_tokens):
        token = choose_token(next_token_logits(model, token_ids), temperature, top_k, generator)
        if token in stop_ids:
            return
        yield token
        token_ids.append(token)
