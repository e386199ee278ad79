"""Log probabilities of a prompt's own tokens, which evaluations over HTTP ask for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from archerchat.inference.prefill import prefill
from archerchat.inference.sequence import TokenLogprobs
from archerchat.model.transformer import Transformer

CHUNK = 256
"""Positions whose logits exist at a time."""


@torch.no_grad()
def score_prompts(
    model: Transformer, rows: Sequence[Sequence[int]], top: int
) -> list[list[TokenLogprobs | None]]:
    """Return what the model gave each token of each row, and the `top` most likely ones there.

    The first token of a row has none: nothing comes before it.
    """
    ran = prefill(model, rows)
    found: list[list[TokenLogprobs | None]] = []
    for row, hidden in zip(rows, ran.hidden, strict=True):
        scores: list[TokenLogprobs | None] = [None]
        targets = torch.tensor(row[1:], device=model.device)
        for start in range(0, len(targets), CHUNK):
            part = targets[start : start + CHUNK]
            logprobs = model.logits(hidden[start : start + len(part)]).log_softmax(dim=-1)
            own = logprobs.gather(1, part[:, None])[:, 0].tolist()
            best = logprobs.topk(top, dim=-1)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            for value, (ids, values) in zip(own, pairs, strict=True):
                scores.append(TokenLogprobs(value, tuple(zip(ids, values, strict=True))))
        found.append(scores)
    return found
