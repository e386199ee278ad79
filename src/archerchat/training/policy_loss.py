"""The loss whose gradient is REINFORCE's: each trained token's cross-entropy times a weight.

As in `model.loss` the logits exist a chunk of tokens at a time and give their gradient on the
spot. Only trained tokens have any: of a rollout neither the prompt nor a tool's output is run
through the unembedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from archerchat.model.loss import IGNORED, LOGIT_CAP, chunk_tokens


def _chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed weighted loss of (n, C), and its gradients for `hidden` and `weight`."""
    squashed = torch.tanh(F.linear(hidden, weight).float() / LOGIT_CAP)  # (n, V)
    log_probabilities = torch.log_softmax(squashed * LOGIT_CAP, dim=1)
    chosen = log_probabilities.gather(1, targets[:, None])[:, 0]
    grad = log_probabilities.exp()
    grad[torch.arange(len(targets), device=grad.device), targets] -= 1
    # The cap divides by LOGIT_CAP and multiplies by it again.
    grad = (grad * (1 - squashed * squashed) * factors[:, None]).to(hidden.dtype)
    return -(chosen * factors).sum(), grad @ weight, grad.T @ hidden


class _WeightedLoss(torch.autograd.Function):
    """Gradients are those of the plain sum until `backward`: scaled, float16 would lose them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        unembedding: Tensor,
        targets: Tensor,
        factors: Tensor,
        vocab_size: int,
        scale: float,
    ) -> Tensor:
        weight = unembedding[:vocab_size].to(hidden.dtype)
        loss = torch.zeros((), device=hidden.device)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(unembedding)
        size = chunk_tokens(vocab_size, hidden.device)
        for start in range(0, hidden.size(0), size):
            span = slice(start, start + size)
            total, for_hidden, for_weight = _chunk(
                hidden[span], weight, targets[span], factors[span]
            )
            loss += total
            grad_hidden[span] = for_hidden
            grad_weight[:vocab_size] += for_weight
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.scale = scale
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0].float() * ctx.scale
        for_hidden = (grad_hidden.float() * scale).to(grad_hidden.dtype)
        return for_hidden, grad_weight * scale, None, None, None, None


def policy_loss(
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    advantages: Tensor,
    vocab_size: int,
    scale: float,
) -> Tensor:
    """Return scale * sum of advantage * -log p(target), over positions whose target is not -1.

    Args:
        hidden: (B, T, C) in the compute dtype.
        unembedding: (V, C) float32 master weight; rows from `vocab_size` on are padding.
        targets: (B, T) int64.
        advantages: (B,) float32, of each row.
        scale: one over the number of trained tokens that the sum is to be averaged over.

    Returns:
        A float32 scalar that backpropagates into `hidden` and `unembedding`; 0 when every target
        is -1.
    """
    trained = targets != IGNORED
    factors = advantages[:, None].expand_as(targets)[trained]
    loss: Tensor = _WeightedLoss.apply(  # type: ignore[no-untyped-call]
        hidden[trained], unembedding, targets[trained], factors, vocab_size, scale
    )
    return loss
