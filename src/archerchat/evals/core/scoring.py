"""From trees to outcomes: batches by a token budget, one forward pass each.

Trees of similar cost go together, the largest first: the first batch needs the most memory. The
next batch is laid out and started before the last one's results are waited for.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from archerchat.evals.core.bundle import TaskType
from archerchat.evals.core.layout import Index, Layout, Level, build_layout, tokens_to_run
from archerchat.evals.core.prompts import Tree
from archerchat.model.transformer import Before, Transformer, norm

CPU_BATCH_TOKENS = 4096
BATCH_TOKENS = 16_384
"""Tokens in a batch on accelerators, unless a single tree has more."""
CPU_BLOCK = 64
"""Queries that attend together on CPUs: small blocks skip more of what windows hide."""
BLOCK = 2048
"""The same on accelerators, where a block should fill the device."""
CPU_LOGITS_BYTES = 4 * 2**20
"""Bound on the float32 logits that exist at a time on CPUs, where they should stay in the cache."""
LOGITS_BYTES = 64 * 2**20
"""The same on accelerators."""

Scores = tuple[Tensor, Tensor | None]
"""Losses (n,) in nats of a layout's targets, and where they were asked for margins (n,): a
target's logit less the highest of the others."""


@dataclass(frozen=True)
class Outcome:
    """The model's answer to one example."""

    index: int
    losses: tuple[float, ...]
    """Each option's mean loss in nats; NaN for one with nothing to score."""
    predicted: int | None
    """The option with the lowest mean loss, the first of equals; None in language modelling."""
    all_predicted: bool
    """In language modelling, whether every scored token is the most likely one."""
    margin: float
    """Distance to a different outcome: between the two lowest losses, or between the logits
    of a target and of its best rival, at the token where that decides."""

    def is_correct(self, gold: int) -> bool:
        return self.all_predicted if self.predicted is None else self.predicted == gold


class TreeLayer:
    """One layer's attention in a batch of trees; takes the place of a KV cache (`Past`).

    Args:
        masks: the batch's masks by what they show. Most blocks of a trunk share one.
    """

    def __init__(
        self, level: Level, masks: dict[bytes, Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.blocks, self.masks = level.blocks, []
        for queries, keys in level.blocks:
            ranges = level.ranges[:, queries] - keys.start
            shown = ranges.tobytes()
            if shown not in masks:
                first, end, in_branch, stop = ranges[..., None]
                places = np.arange(keys.stop - keys.start)
                seen = (places >= first) & (places < end) | (places >= in_branch) & (places < stop)
                bias = torch.zeros(seen.shape, dtype=dtype, device=device)
                masks[shown] = bias.masked_fill_(torch.from_numpy(~seen).to(device), -math.inf)
            self.masks.append(masks[shown])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from the kept tokens (1, n, H, D) to the incoming ones (1, N, K, D)."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        parts = [
            F.scaled_dot_product_attention(
                q[:, :, queries], k[:, :, keys], v[:, :, keys], mask, enable_gqa=True
            ).transpose(1, 2)
            for (queries, keys), mask in zip(self.blocks, self.masks, strict=True)
        ]
        return torch.cat(parts, dim=1)


def hidden_of(model: Transformer, layout: Layout) -> Tensor:
    """Return the unembedding's input (n, C) that predicts each of the layout's targets."""
    device, dtype = model.device, model.compute_dtype

    def moved(values: Index) -> Tensor:
        return torch.from_numpy(values).to(device)

    token_ids, previous_ids = moved(layout.token_ids)[None], moved(layout.previous_ids)[None]
    previous = norm(model.token_embedding(previous_ids.clamp(min=0)).to(dtype))
    previous = previous * (previous_ids >= 0)[..., None]
    masks: dict[bytes, Tensor] = {}
    made = {id(level): TreeLayer(level, masks, device, dtype) for level in layout.levels}
    layers = [made[id(level)] for level in layout.levels]
    kept = [None if level.keeps_all else moved(level.kept) for level in layout.levels]
    before = Before(moved(layout.positions), previous, layers, kept)
    return model.hidden(token_ids, before=before)[0, moved(layout.sources)]


@torch.no_grad()
def score(model: Transformer, layout: Layout, margins: bool) -> Scores:
    """Score every target of a batch, the logits of some at a time; on request its margin too."""
    hidden, targets = hidden_of(model, layout), torch.from_numpy(layout.targets).to(model.device)
    budget = CPU_LOGITS_BYTES if model.device.type == "cpu" else LOGITS_BYTES
    chunk = max(1, budget // (4 * model.config.padded_vocab_size))
    losses, gaps = [], []
    for start in range(0, len(targets), chunk):
        labels = targets[start : start + chunk]
        logits = model.logits(hidden[start : start + chunk])
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        if margins:
            chosen = logits.gather(1, labels[:, None])
            rivals = logits.scatter(1, labels[:, None], -math.inf).amax(dim=1)
            gaps.append(chosen[:, 0] - rivals)
    return torch.cat(losses), torch.cat(gaps) if margins else None


def iter_batches(
    trees: Sequence[Tree], windows: Sequence[int], most_tokens: int
) -> Iterator[list[Tree]]:
    """Cut trees into batches of at most `most_tokens` to run, unless one tree alone has more."""
    costs = [tokens_to_run(tree, windows) for tree in trees]
    batch: list[Tree] = []
    total = 0
    for i in sorted(range(len(trees)), key=lambda i: -costs[i]):
        if batch and total + costs[i] > most_tokens:
            yield batch
            batch, total = [], 0
        batch.append(trees[i])
        total += costs[i]
    if batch:
        yield batch


def iter_outcomes(
    model: Transformer,
    trees: Sequence[Tree],
    task_type: TaskType,
    most_tokens: int | None = None,
) -> Iterator[list[Outcome]]:
    """Yield each batch's outcomes.

    Args:
        model: best in the form for inference (`build_inference_model`).
        most_tokens: in a batch; by default what fills the device.
    """
    on_cpu, windows = model.device.type == "cpu", model.config.windows
    most_tokens = most_tokens or (CPU_BATCH_TOKENS if on_cpu else BATCH_TOKENS)
    compare = task_type == "language_modeling"
    unscored = [tree for tree in trees if not len(tree.targets)]
    if unscored:  # options that are all the same text
        worst = math.inf if compare else None
        yield [_outcome(tree, [math.nan] * len(tree.lengths), worst) for tree in unscored]
    running = deque[tuple[list[Tree], Layout, Scores]]()
    for batch in iter_batches([t for t in trees if len(t.targets)], windows, most_tokens):
        layout = build_layout(batch, windows, CPU_BLOCK if on_cpu else BLOCK)
        running.append((batch, layout, score(model, layout, compare)))
        if len(running) > 1:
            yield _outcomes(*running.popleft())
    yield from (_outcomes(*each) for each in running)


def _outcomes(trees: Sequence[Tree], layout: Layout, scores: Scores) -> list[Outcome]:
    """Sum up a batch's targets by option and options by tree."""
    options, (losses, margins) = layout.options, scores
    total = sum(len(tree.lengths) for tree in trees)
    sums = np.bincount(options, losses.double().cpu().numpy(), minlength=total)
    counts = np.bincount(options, minlength=total)
    means = np.divide(sums, counts, out=np.full(total, np.nan), where=counts > 0).tolist()
    worst = None
    if margins is not None:
        worst = np.full(total, np.inf)
        np.minimum.at(worst, options, margins.double().cpu().numpy())
    outcomes, first = [], 0
    for tree in trees:
        margin = None if worst is None else float(worst[first])
        outcomes.append(_outcome(tree, means[first : first + len(tree.lengths)], margin))
        first += len(tree.lengths)
    return outcomes


def _outcome(tree: Tree, losses: list[float], worst: float | None) -> Outcome:
    if worst is not None:
        return Outcome(tree.index, tuple(losses), None, worst > 0, abs(worst))
    # As the reference chooses: nothing compares as less than NaN, so an option with nothing to
    # score wins where it stands first, and nowhere else.
    predicted = losses.index(min(losses))
    ranked = sorted(loss for loss in losses if not math.isnan(loss))
    decided = math.isnan(losses[0]) or len(ranked) < 2
    margin = math.inf if decided else ranked[1] - ranked[0]
    return Outcome(tree.index, tuple(losses), predicted, False, margin)
