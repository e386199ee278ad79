"""AdamW for embeddings, the unembedding and scalars (SPEC section 3).

The decay is decoupled from the gradient and scaled by the rate: https://arxiv.org/abs/1711.05101.
"""

from __future__ import annotations

import torch
from torch import Tensor

HASH = -0x61C88647
"""2^32 over the golden ratio, as a signed number: spreads low bits over high ones."""


def adamw_update(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    rate: Tensor,
    weight_decay: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    correction1: Tensor,
    correction2: Tensor,
    epsilon: float,
) -> None:
    """Update one parameter and its two moments in place, in float32 whatever is stored.

    Args:
        parameter, gradient: of one shape, in the storage dtype.
        mean, square: moments of that shape, in float32 or bfloat16.
        rate, weight_decay, beta1, beta2: 0-dim float32 tensors, so that a new value does not
            recompile.
        correction1, correction2: 1 - beta^t, t counted from 1.
    """
    g = gradient.float()
    new_mean = mean.float().lerp(g, 1 - beta1)
    new_square = square.float().lerp(g.square(), 1 - beta2)
    store(mean, new_mean)
    store(square, new_square)
    denominator = (new_square / correction2).sqrt() + epsilon
    decayed = parameter.float() * (1 - rate * weight_decay)
    parameter.copy_(decayed - rate * (new_mean / correction1) / denominator)


def store(target: Tensor, value: Tensor) -> None:
    """Copy float32 values into a buffer, rounding up or down at random where it is bfloat16.

    To the nearest, an average would stand still as soon as its changes are under half of the last
    bit. Up with the probability of the part that is cut off, it is right on average. The draw is a
    hash of the value's own bits, so that a resumed run repeats it.
    """
    if target.dtype == torch.float32:
        target.copy_(value)
        return
    bits = value.view(torch.int32)
    noise = ((bits * HASH) >> 16) & 0xFFFF
    target.copy_(((bits + noise) & ~0xFFFF).view(torch.float32))
