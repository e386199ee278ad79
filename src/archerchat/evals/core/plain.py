"""Score one example at a time, whole prompts through the whole model: the oracle of `forward`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from archerchat.evals.core.prompts import Prompt
from archerchat.model.transformer import Transformer


@torch.no_grad()
def score_plainly(model: Transformer, prompts: Sequence[Prompt]) -> tuple[list[float], bool]:
    """Return each option's mean loss, and whether every token of the first's span is predicted.

    An option with nothing to score has an infinite loss: it cannot win.
    """
    width = max(len(prompt.token_ids) for prompt in prompts)
    rows = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt.token_ids)] = torch.from_numpy(prompt.token_ids)
    rows = rows.to(model.device)
    logits = model(rows)[:, :-1]  # (O, T - 1, V)
    losses = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    predicted: Tensor = logits.argmax(dim=-1) == rows[:, 1:]
    spans = [slice(p.start - 1, len(p.token_ids) - 1) for p in prompts]
    parts = [losses[i, span] for i, span in enumerate(spans)]
    means = [part.mean().item() if part.numel() else math.inf for part in parts]
    return means, bool(predicted[0, spans[0]].all())
