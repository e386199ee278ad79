"""The loss of every stage: a weighted cross-entropy that never holds all logits at once.

Pretraining and fine-tuning weight each trained token by 1 and take the mean; reinforcement
weights it by its advantage (REINFORCE, SPEC section 8).

The logits of B*T tokens over V entries in float32 would be the largest tensor of a step by far.
They are formed one chunk of tokens at a time. The chunk's gradients for the hidden states and for
the unembedding are taken on the spot, so the backward pass only scales them: three matrix products,
as in the plain computation. In bfloat16 the logits are read once; float32 rounds as a plain
cross-entropy does.

The soft cap (SPEC section 2; Gemma 2, https://arxiv.org/abs/2408.00118) bounds every logit by 15,
so the exponentials need no running maximum in float32: V * exp(15) is far inside its range. Forming
logits a chunk at a time is also the idea of Cut Your Losses (https://arxiv.org/abs/2411.09009).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from archerchat.model.compiling import compiled

LOGIT_CAP = 15.0
IGNORED = -1
"""The target of a position that is not trained on."""

CHUNK_BYTES = 256 * 2**20
"""Least bound on one chunk's float32 logits on accelerators."""
CHUNK_SHARE = 1 / 64
"""Share of an accelerator's memory that a chunk may take beyond that: the more tokens, the more of
a large card's processors work on the products with few columns (docs/LOG.md)."""
CPU_CHUNK_BYTES = 8 * 2**20
"""The bound on CPUs, where a chunk should stay in the cache."""


def chunk_tokens(vocab_size: int, device: torch.device, memory_bytes: int | None = None) -> int:
    """Return how many tokens' logits to form at a time; by default the device tells its memory."""
    if device.type == "cpu":
        return max(128, CPU_CHUNK_BYTES // (4 * vocab_size) // 64 * 64)
    if memory_bytes is None and device.type == "cuda":
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
    fitting = int(max(CHUNK_BYTES, CHUNK_SHARE * (memory_bytes or 0))) // (4 * vocab_size)
    return 1 << max(7, fitting.bit_length() - 1)  # a power of two divides the micro-batch


def _softcap(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return tanh(logits / cap) and its derivative, both float32, from a single exponential."""
    u = 1 / (torch.exp(logits.float() * (2 / LOGIT_CAP)) + 1)
    return 1 - 2 * u, 4 * u * (1 - u)


def chunk_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return each position's loss in nats (n,), 0 where the target is -1."""
    logits = F.linear(hidden, weight)  # (n, V)
    squashed, _ = _softcap(logits)
    total = torch.exp(squashed * LOGIT_CAP).sum(dim=1)
    chosen, _ = _softcap(logits.gather(1, targets.clamp(min=0)[:, None]))
    return torch.where(targets != IGNORED, total.log() - chosen[:, 0] * LOGIT_CAP, 0.0)


def _plain_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses (n,) and d loss / d raw logit (n, V), rounded as a plain cross-entropy does.

    At the first step the true gradients of backout_lambda and of the input lambdas vanish, and
    Adam divides what rounding leaves of them by itself. Rounded otherwise, a run from the same
    weights parts from the reference's within fifteen steps (`docs/LOG.md`).
    """
    hit = torch.arange(logits.size(1), device=labels.device)[None, :] == labels[:, None]
    squashed = torch.tanh(logits.float() / LOGIT_CAP)
    log_probabilities = torch.log_softmax(squashed * LOGIT_CAP, dim=1)
    chosen = log_probabilities.gather(1, labels[:, None])
    grad = torch.ops.aten._log_softmax_backward_data(
        -hit.float(), log_probabilities, 1, torch.float32
    )
    return -chosen[:, 0], torch.ops.aten.tanh_backward(grad * LOGIT_CAP, squashed) / LOGIT_CAP


def chunk_loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor, grad_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the chunk's weighted loss and its gradient for `hidden`; add that for `weight`.

    Args:
        hidden: (n, C); weight: (V, C), both in the compute dtype; targets: (n,).
        factors: (n,) float32, each position's weight; 0 where the target is -1.
        grad_weight: (V, C) float32, which the chunk's gradient is added to.

    Returns:
        The loss, (n, C), and what is still to be added to `grad_weight`, if anything: (n, C)
        float32 rows, each at its target.
    """
    logits = F.linear(hidden, weight)  # (n, V)
    labels = targets.clamp(min=0)
    if hidden.dtype != torch.bfloat16:
        losses, grad = _plain_gradient(logits, labels)
        grad = (grad * factors[:, None]).to(hidden.dtype)
        grad_weight += grad.T @ hidden
        return (losses * factors).sum(), grad @ weight, None
    # One pass over the logits: what divides a row and what only its target gets come after the
    # products, over C columns instead of V.
    squashed, slope = _softcap(logits)
    exponential = torch.exp(squashed * LOGIT_CAP)
    total = exponential.sum(dim=1)
    numerator = (exponential * slope).to(hidden.dtype)
    chosen, chosen_slope = _softcap(logits.gather(1, labels[:, None]))
    share, at_target = (factors / total)[:, None], -(factors[:, None] * chosen_slope)
    for_hidden = (numerator @ weight).float() * share + at_target * weight[labels].float()
    grad_weight += numerator.T @ (hidden.float() * share).to(hidden.dtype)
    losses = (total.log() - chosen[:, 0] * LOGIT_CAP) * factors
    return losses.sum(), for_hidden.to(hidden.dtype), at_target * hidden.float()


def scale_gradients(
    grad_hidden: Tensor, grad_weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return both gradients times a float32 scalar, multiplied in float32."""
    return (grad_hidden.float() * scale).to(grad_hidden.dtype), grad_weight * scale


@dataclass(frozen=True)
class LossKernels:
    """The functions that the loss is made of, as they are or compiled."""

    gradients: Callable[..., tuple[Tensor, Tensor, Tensor | None]] = chunk_loss_and_gradients
    scale: Callable[..., tuple[Tensor, Tensor]] = scale_gradients
    losses: Callable[..., Tensor] = chunk_losses

    @classmethod
    def compiled(cls) -> LossKernels:
        """Compile each for the fixed shapes of a training step."""
        return cls(
            compiled(chunk_loss_and_gradients), compiled(scale_gradients), compiled(chunk_losses)
        )


class _WeightedLoss(torch.autograd.Function):
    """Gradients are those of the sum until `backward`: small factors would underflow float16."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        unembedding: Tensor,
        targets: Tensor,
        factors: Tensor,
        scale: Tensor,
        vocab_size: int,
        kernels: LossKernels,
    ) -> Tensor:
        weight = unembedding[:vocab_size].to(hidden.dtype)
        loss = torch.zeros((), device=hidden.device)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(unembedding)
        size = chunk_tokens(vocab_size, hidden.device)
        for start in range(0, hidden.size(0), size):
            span = slice(start, start + size)
            total, for_hidden, at_target = kernels.gradients(
                hidden[span], weight, targets[span], factors[span], grad_weight[:vocab_size]
            )
            loss += total
            grad_hidden[span] = for_hidden
            if at_target is not None:
                grad_weight.index_add_(0, targets[span].clamp(min=0), at_target)
        ctx.save_for_backward(grad_hidden, grad_weight, scale)
        ctx.scale_gradients = kernels.scale
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, scale = ctx.saved_tensors
        scaled = ctx.scale_gradients(grad_hidden, grad_weight, scale * grad_outputs[0])
        return *scaled, None, None, None, None, None


def weighted_loss(
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    vocab_size: int,
    weights: Tensor | None = None,
    scale: float | None = None,
    kernels: LossKernels = LossKernels(),
) -> Tensor:
    """Return `scale` times the sum of weight times cross-entropy over the trained positions.

    Args:
        hidden: (..., C) in the compute dtype.
        unembedding: (V, C) float32 master weight; rows from `vocab_size` on are padding.
        targets: (...) int64; a position whose target is -1 is not trained.
        weights: (...) float32; 1 for each position by default.
        scale: by default 1 / the number of trained positions, which gives the mean in nats.

    Returns:
        A float32 scalar with gradients for `hidden` and `unembedding`; 0 when no target is trained.
    """
    flat = targets.flatten()
    factors = (flat != IGNORED).float()
    if scale is None:
        factor = 1 / factors.sum().clamp(min=1)
    else:
        factor = torch.full((), scale, device=hidden.device)  # a copy would wait for CUDA
    if weights is not None:
        factors = factors * weights.flatten()
    loss: Tensor = _WeightedLoss.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, -2), unembedding, flat, factors, factor, vocab_size, kernels
    )
    return loss


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    vocab_size: int,
    kernels: LossKernels = LossKernels(),
) -> Tensor:
    """Return each position's cross-entropy (B, T) in nats, 0 where the target is -1; arguments are
    those of `weighted_loss`, with `hidden` (B, T, C)."""
    weight, flat = unembedding[:vocab_size].to(hidden.dtype), hidden.flatten(0, 1)
    size = chunk_tokens(vocab_size, hidden.device)
    spans = [slice(start, start + size) for start in range(0, flat.size(0), size)]
    labels = targets.flatten()
    losses = [kernels.losses(flat[span], weight, labels[span]) for span in spans]
    return torch.cat(losses).view_as(targets)
