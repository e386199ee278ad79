"""Bits per byte: a loss that does not depend on the tokenizer (SPEC section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from archerchat.errors import DataError


@torch.no_grad()
def evaluate_bits_per_byte(
    token_losses: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: Tensor,
) -> float:
    """Divide the loss of all targets by the bytes they stand for.

    Args:
        token_losses: maps inputs and targets (B, T) to losses in nats (B, T).
        batches: inputs and targets (B, T); a target of -1 counts in neither sum.
        token_bytes: (V,) byte length of each token, 0 for special ones, which do not count.

    Raises:
        DataError: no target stands for any byte.
    """
    nats, total_bytes = 0.0, 0
    for inputs, targets in batches:
        sizes = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
        losses = token_losses(inputs, targets)
        nats += (losses * (sizes > 0)).sum(dtype=torch.float32).item()
        total_bytes += int(sizes.sum().item())
    if total_bytes == 0:
        raise DataError("there is no text to evaluate on: the data holds only empty documents")
    return nats / (math.log(2) * total_bytes)
