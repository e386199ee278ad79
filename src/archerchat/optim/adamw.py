"""AdamW for embeddings, the unembedding and scalars (SPEC section 3).

The decay is decoupled from the gradient and scaled by the rate: https://arxiv.org/abs/1711.05101.
"""

from __future__ import annotations

from torch import Tensor


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
        mean, square: float32 moments of that shape.
        rate, weight_decay, beta1, beta2: 0-dim float32 tensors, so that a new value does not
            recompile.
        correction1, correction2: 1 - beta^t, t counted from 1.
    """
    g = gradient.float()
    mean.lerp_(g, 1 - beta1)
    square.lerp_(g.square(), 1 - beta2)
    denominator = (square / correction2).sqrt() + epsilon
    decayed = parameter.float() * (1 - rate * weight_decay)
    parameter.copy_(decayed - rate * (mean / correction1) / denominator)
