"""AdamW for embeddings, the unembedding and scalars (SPEC section 3).

The decay is decoupled from the gradient and scaled by the rate: https://arxiv.org/abs/1711.05101.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = -0x61C88647
"""2^32 over the golden ratio, as a signed number."""
MIX = (0x7FEB352D, -0x7B935975)
"""Factors that mix 32 bits well, found by search: https://github.com/skeeto/hash-prospector."""


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
    step: Tensor,
    epsilon: float,
) -> None:
    """Update one parameter and its two moments in place, in float32 whatever is stored.

    Args:
        parameter, gradient: of one shape, in the storage dtype.
        mean, square: moments of that shape, in float32 or bfloat16.
        rate, weight_decay, beta1, beta2: 0-dim float32 tensors, so that a new value does not
            recompile.
        correction1, correction2: 1 - beta^t, t counted from 1.
        step: t, 0-dim int32.
    """
    g = gradient.float()
    new_mean = mean.float().lerp(g, 1 - beta1)
    new_square = square.float().lerp(g.square(), 1 - beta2)
    mean.copy_(new_mean)
    store_square(square, new_square, step)
    denominator = (new_square / correction2).sqrt() + epsilon
    decayed = parameter.float() * (1 - rate * weight_decay)
    parameter.copy_(decayed - rate * (new_mean / correction1) / denominator)


def store_square(target: Tensor, value: Tensor, step: Tensor) -> None:
    """Copy float32 values into a buffer; if it is bfloat16, round up or down at random.

    An average that changes by half a percent per step would stand still if it were rounded to the
    nearest. The probability of rounding up is the part that is cut off, so the mean is right. The
    random number is a hash of the step and of the place in the buffer, so a resumed run repeats it.
    """
    if target.dtype == torch.float32:
        target.copy_(value)
        return
    places = torch.arange(value.numel(), dtype=torch.int32, device=value.device).view(value.shape)
    x = places * GOLDEN + step * MIX[1]
    for shift, factor in ((16, MIX[0]), (15, MIX[1])):
        x = (x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))) * factor
    noise = (x >> 16) & 0xFFFF
    bits = value.contiguous().view(torch.int32)
    target.copy_(((bits + noise) & ~0xFFFF).view(torch.float32))
