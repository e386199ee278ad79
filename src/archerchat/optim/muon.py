"""Muon on stacks of equal-shaped matrices (SPEC section 3).

- Momentum, then orthogonalisation: Muon, https://kellerjordan.github.io/posts/muon/, shown to scale
  with weight decay in https://arxiv.org/abs/2502.16982.
- Five steps of Polar Express approximate the polar factor: https://arxiv.org/abs/2505.16932.
- A variance per row or column evens out the update: NorMuon, https://arxiv.org/abs/2510.05491.
- Decay acts only where it agrees with the update: https://arxiv.org/abs/2510.12402.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""(a, b, c) of each step, computed by the paper's method: x <- a x + (b A + c A A) x."""
TINY = 1e-10
VARIANCE_DECAY = 0.9


def root_sum(squares: Tensor) -> Tensor:
    """Return the root of each matrix's sum, (n, 1, 1) float32, never below 1e-10."""
    return squares.sum(dim=(-2, -1), keepdim=True).sqrt().clamp(min=TINY)


def orthogonalize(g: Tensor) -> Tensor:
    """Return an approximation of each matrix's polar factor, (n, out, in) in g's dtype."""
    x = (g.float() / (1.01 * root_sum(g.float().square()) + 1e-6)).to(g.dtype)
    tall = g.size(-2) > g.size(-1)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = b * gram + c * (gram @ gram)
        x = a * x + (x @ polynomial if tall else polynomial @ x)
    return x


def variance_shape(shape: torch.Size) -> tuple[int, ...]:
    """Return the shape of the second-moment buffer of a stack (n, out, in)."""
    n, rows, columns = shape
    return (n, rows, 1) if rows >= columns else (n, 1, columns)


def muon_update(
    parameters: Tensor,
    gradients: Tensor,
    momentum_buffer: Tensor,
    variance_buffer: Tensor,
    rate: Tensor,
    weight_decay: Tensor,
    momentum: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return the updated stack; both buffers are updated in place.

    Args:
        parameters, gradients: (n, out, in) float32.
        momentum_buffer: of that shape, in float32 or bfloat16.
        variance_buffer: `variance_shape` of that, float32, starting from zero.
        rate, weight_decay, momentum: 0-dim float32 tensors.
        dtype: of the orthogonalisation.
    """
    rows, columns = parameters.shape[-2:]
    average = momentum_buffer.float().lerp(gradients, 1 - momentum)
    momentum_buffer.copy_(average)
    g = torch.lerp(gradients, average, momentum)
    squares = g.square().sum(dim=-1, keepdim=True)
    row_norms = squares.sqrt().clamp(min=1e-6)
    g = orthogonalize((g * (root_sum(squares) / math.sqrt(rows) / row_norms)).to(dtype)).float()

    # g has the norm sqrt(min(out, in)) before and after the variance reduction. Both norms follow
    # from the mean squares of rows or columns, so one pass over g is enough.
    squares = g.square().mean(dim=-1 if rows >= columns else -2, keepdim=True)
    total = squares.sum(dim=(-2, -1), keepdim=True).clamp(min=TINY**2)
    variance_buffer.lerp_(squares / total, 1 - VARIANCE_DECAY)
    adaptive = variance_buffer.clamp(min=TINY).rsqrt()
    g = g * (adaptive / root_sum(squares * adaptive.square()))

    rate = rate * math.sqrt(max(1.0, rows / columns))  # as https://github.com/KellerJordan/Muon
    agrees = (g * parameters >= 0).float()
    return parameters - rate * g - rate * weight_decay * parameters * agrees
