"""Next-token loss that never holds every logit at once.

The logits of B*T tokens over V entries in float32 would be the largest tensor of a step by far.
Here they are formed a chunk of tokens at a time; the chunk's gradient with respect to the
hidden states and to the unembedding is taken on the spot, so the backward pass only scales.
That is three matrix products in all, as many as the plain computation, and no recomputation.

The soft cap (SPEC section 2) bounds every logit by 15, so the exponentials need no running
maximum in float32: V * exp(15) is far inside its range.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_CAP = 15.0
IGNORED = -1
"""The target of a position that is not trained on."""

CHUNK_BYTES = 256 * 2**20
"""Bound on one chunk's float32 logits on accelerators."""
CPU_CHUNK_BYTES = 8 * 2**20
"""The same on CPUs, where a chunk should stay in the cache."""


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Return how many tokens' logits to form at a time."""
    budget = CPU_CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES
    return max(64, budget // (4 * vocab_size) // 64 * 64)


def token_losses(hidden: Tensor, unembedding: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Compute each position's cross-entropy in nats, 0 where the target is -1.

    Args:
        hidden: (N, C) in the compute dtype.
        unembedding: (V, C); rows from `vocab_size` on are padding.
        targets: (N,) int64.

    Returns:
        (N,) float32; carries no gradient.
    """
    with torch.no_grad():
        weight = unembedding[:vocab_size].to(hidden.dtype)
        size = chunk_tokens(vocab_size, hidden.device)
        return torch.cat(
            [
                _chunk_losses(h, weight, t)[0]
                for h, t in zip(hidden.split(size), targets.split(size), strict=True)
            ]
        )


def _chunk_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Return losses, capped logits over the cap, their exponentials' sums, and validity."""
    squashed = torch.tanh(F.linear(hidden, weight).float() * (1 / LOGIT_CAP))  # (n, V)
    total = torch.exp(squashed * LOGIT_CAP).sum(dim=1)
    valid = targets != IGNORED
    picked = squashed.gather(1, targets.clamp(min=0)[:, None])[:, 0] * LOGIT_CAP
    return torch.where(valid, total.log() - picked, 0.0), squashed, total, valid


class _MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, unembedding: Tensor, targets: Tensor, vocab_size: int
    ) -> Tensor:
        weight = unembedding[:vocab_size].to(hidden.dtype)
        count = (targets != IGNORED).sum().clamp(min=1)
        loss = torch.zeros((), device=hidden.device)
        grad_hidden, grad_weight = [], torch.zeros(weight.shape, device=hidden.device)
        size = chunk_tokens(vocab_size, hidden.device)
        for h, t in zip(hidden.split(size), targets.split(size), strict=True):
            losses, squashed, total, valid = _chunk_losses(h, weight, t)
            loss = loss + losses.sum()
            # d loss / d raw logit = (softmax - onehot) * (1 - tanh^2), for valid positions
            share = torch.exp(squashed * LOGIT_CAP) / total[:, None]
            hit = torch.arange(vocab_size, device=t.device)[None, :] == t[:, None]
            grad = (share - hit.float()) * (1 - squashed.square())
            grad = (grad * (valid / count)[:, None]).to(h.dtype)
            grad_hidden.append(grad @ weight)
            grad_weight = grad_weight + grad.T @ h
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight)
        ctx.padding = unembedding.size(0) - vocab_size
        return loss / count

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0]
        grad_weight = F.pad(grad_weight * scale, (0, 0, 0, ctx.padding))
        return grad_hidden * scale.to(grad_hidden.dtype), grad_weight, None, None


def mean_loss(hidden: Tensor, unembedding: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Average the cross-entropy in nats over the positions whose target is not -1.

    Args:
        hidden: (B, T, C) in the compute dtype.
        unembedding: (V, C) float32 master weight; rows from `vocab_size` on are padding.
        targets: (B, T) int64.

    Returns:
        A float32 scalar that backpropagates into `hidden` and `unembedding`; 0 when every
        target is -1.
    """
    flat = hidden.flatten(0, 1)
    loss: Tensor = _MeanLoss.apply(flat, unembedding, targets.flatten(), vocab_size)
    return loss
