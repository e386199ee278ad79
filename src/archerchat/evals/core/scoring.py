"""From trees to outcomes: batches by a token budget, one forward pass each.

Trees of similar cost go together, the largest first: the first batch needs the most memory. The
next batch is laid out and started before the last one's results are waited for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from archerchat.evals.core.bundle import TaskType
from archerchat.evals.core.forward import Scorer, Scores
from archerchat.evals.core.layout import Layout, build_layout, tokens_to_run
from archerchat.evals.core.prompts import Tree

CPU_BATCH_TOKENS = 4096
BATCH_TOKENS = 16_384
"""Tokens in a batch on accelerators, unless a single tree has more."""


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
    """How far the outcome is from another: between the two lowest losses, or between the logits
    of a target and of its best rival, at the token where that decides."""

    def is_correct(self, gold: int) -> bool:
        return self.all_predicted if self.predicted is None else self.predicted == gold


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
    scorer: Scorer,
    trees: Sequence[Tree],
    task_type: TaskType,
    most_tokens: int | None = None,
) -> Iterator[tuple[list[Outcome], int]]:
    """Yield each batch's outcomes and the tokens it took.

    Args:
        most_tokens: in a batch; by default what fills the device.
    """
    if most_tokens is None:
        most_tokens = CPU_BATCH_TOKENS if scorer.model.device.type == "cpu" else BATCH_TOKENS
    compare = task_type == "language_modeling"
    unscored = [tree for tree in trees if not len(tree.target)]
    if unscored:  # options that are all the same text
        worst = math.inf if compare else None
        yield [_outcome(tree, [math.nan] * len(tree.lengths), worst) for tree in unscored], 0
    running: tuple[list[Tree], Layout, Scores] | None = None
    for batch in iter_batches([t for t in trees if len(t.target)], scorer.windows, most_tokens):
        layout = build_layout(batch, scorer.windows, scorer.block)
        started = batch, layout, scorer.score(layout, compare)
        if running:
            yield _outcomes(*running), len(running[1].token_ids)
        running = started
    if running:
        yield _outcomes(*running), len(running[1].token_ids)


def _outcomes(trees: Sequence[Tree], layout: Layout, scores: Scores) -> list[Outcome]:
    """Sum up a batch's targets by option and options by tree."""
    options, (losses, margins) = layout.pair_option, scores
    total = sum(len(tree.lengths) for tree in trees)
    sums, counts = np.zeros(total), np.bincount(options, minlength=total)
    np.add.at(sums, options, losses.double().cpu().numpy())
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
