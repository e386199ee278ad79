"""Where each token of a batch of trees lies, layer by layer, and who attends to whom.

Linear layers run over a flat list of tokens without padding: all trunks, then all branches.
Only attention sees rows: trunks aligned at their end, so that a window reaches back equally far
in every row, and branches after them.

Nothing is computed that no score depends on. The last layer needs queries at the scored positions
and keys as far back as its window; the layer below needs outputs there; and so on down. With
windows of 128 the first layers of a 1000-token prompt are run on a few hundred tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from archerchat.evals.core.trees import Tree

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Level:
    """One layer: which tokens come in, which go on, and the rows of its attention."""

    kept: Index | None
    """The incoming tokens that are needed after this layer; None is all of them."""
    trunk_keys: Index
    """(B, Lk): trunk tokens among the incoming, aligned at the end; padding says 0."""
    trunk_queries: Index
    """(B, Lq): likewise among the outgoing."""
    padded: bool
    """Whether `trunk_keys` has padding."""
    branch_keys: Index
    """(B, O, S): branch tokens among the incoming, aligned at the start; padding says 0."""
    branch_queries: Index
    """Likewise among the outgoing."""
    back: Index
    """For each outgoing token, its place among trunk_queries and then branch_queries, flattened."""


@dataclass(frozen=True)
class Layout:
    """A batch of trees, laid out."""

    token_ids: Index
    """(N,) of the tokens that the first layer sees."""
    previous_ids: Index
    """(N,) of the token before each, -1 where there is none."""
    positions: Index
    """(N,)."""
    key_lengths: tuple[Index, ...]
    """A layer: (B,), trunk tokens in `trunk_keys`."""
    levels: tuple[Level, ...]
    scored: Index
    """The tokens after the last layer that give logits."""
    pair_source: Index
    """For each scored target, which of `scored` predicts it; ascending."""
    pair_target: Index
    pair_option: Index
    """Numbered over the batch's trees in turn."""


def needed_trunk(tree: Tree, windows: Sequence[int]) -> list[int]:
    """Return how many of a trunk's last tokens come into each layer, and go out of the last."""
    length = len(tree.trunk)
    needed = [length - tree.first_scored]
    for window in reversed(windows):
        queries = needed[-1]
        reach = queries + window if queries else window if tree.branches else 0
        needed.append(min(length, max(reach, queries)))
    return needed[::-1]


def tokens_to_run(tree: Tree, windows: Sequence[int]) -> int:
    """Return how many tokens the first layer sees of a tree."""
    return needed_trunk(tree, windows)[0] + sum(map(len, tree.branches))


def build_layout(trees: Sequence[Tree], windows: Sequence[int]) -> Layout:
    """Lay out a batch.

    Args:
        windows: for each layer the w such that a query at t sees keys t-w .. t.
    """
    lengths = np.array([len(tree.trunk) for tree in trees])
    needed = np.array([needed_trunk(tree, windows) for tree in trees]).T  # (L + 1, B)
    sizes = np.zeros((len(trees), max(len(tree.branches) for tree in trees)), dtype=np.int64)
    for b, tree in enumerate(trees):
        sizes[b, : len(tree.branches)] = [len(branch) for branch in tree.branches]
    starts = _offsets(sizes.ravel()).reshape(sizes.shape)
    levels = tuple(_level(needed[i], needed[i + 1], sizes, starts) for i in range(len(windows)))
    scored, source = _scored(trees, lengths - needed[-1], needed[-1], starts)
    options = _offsets(np.array([tree.num_options for tree in trees]))
    pair_option = [tree.option + first for tree, first in zip(trees, options, strict=True)]
    order = np.argsort(source, kind="stable")
    return Layout(
        *_tokens(trees, lengths - needed[0]),
        key_lengths=tuple(needed[:-1]),
        levels=levels,
        scored=scored,
        pair_source=source[order],
        pair_target=np.concatenate([tree.target for tree in trees]).astype(np.int64)[order],
        pair_option=np.concatenate(pair_option)[order],
    )


def _tokens(trees: Sequence[Tree], first: Index) -> tuple[Index, Index, Index]:
    """Return the first layer's tokens, those before them, and their positions."""
    ids, previous, positions = [], [], []
    none = np.array([-1])
    for tree, start in zip(trees, first, strict=True):
        trunk, length = tree.trunk, len(tree.trunk)
        ids.append(trunk[start:])
        previous += [trunk[start - 1 : -1]] if start else [none[: len(trunk)], trunk[:-1]]
        positions.append(np.arange(start, length))
    for tree in trees:
        for branch in tree.branches:
            ids.append(branch)
            previous += [tree.trunk[-1:], branch[:-1]]
            positions.append(np.arange(len(tree.trunk), len(tree.trunk) + len(branch)))
    joined = [np.concatenate(part).astype(np.int64) for part in (ids, previous, positions)]
    return joined[0], joined[1], joined[2]


def _level(incoming: Index, outgoing: Index, sizes: Index, starts: Index) -> Level:
    """Lay out one layer.

    Args:
        incoming: (B,) trunk tokens that come in; outgoing: that go out.
        sizes: (B, O) tokens of each branch; starts: where each begins among all branches.
    """
    total, branch_tokens = int(incoming.sum()), int(sizes.sum())
    kept = None
    if (incoming != outgoing).any():
        ends = np.cumsum(incoming)
        kept = np.concatenate(
            [_ranges(ends - outgoing, outgoing), np.arange(total, total + branch_tokens)]
        )
    longest = int(sizes.max(initial=0))
    inside = np.arange(longest) < sizes[..., None]  # (B, O, S)
    places = np.where(inside, starts[..., None] + np.arange(longest), 0)
    rows, queries = len(incoming), int(outgoing.max())
    in_rows = _ranges(np.arange(rows) * queries + queries - outgoing, outgoing)
    in_branches = rows * queries + np.flatnonzero(inside.ravel())
    return Level(
        kept=kept,
        trunk_keys=_aligned_at_end(incoming),
        trunk_queries=_aligned_at_end(outgoing),
        padded=bool((incoming != incoming.max()).any()),
        branch_keys=np.where(inside, places + total, 0),
        branch_queries=np.where(inside, places + int(outgoing.sum()), 0),
        back=np.concatenate([in_rows, in_branches]),
    )


def _aligned_at_end(counts: Index) -> Index:
    """Return (B, max(counts)) indices of rows that lie one after the other."""
    columns = np.arange(int(counts.max())) - int(counts.max())  # -L .. -1
    indices = np.cumsum(counts)[:, None] + columns
    return np.where(columns >= -counts[:, None], indices, 0)


def _scored(
    trees: Sequence[Tree], first: Index, outgoing: Index, starts: Index
) -> tuple[Index, Index]:
    """Return the tokens that give logits, without repetition, and each target's place there.

    Args:
        first: (B,) position of the first trunk token after the last layer; outgoing: how many.
        starts: (B, O) where each branch begins among all branches.
    """
    rows, total = _offsets(outgoing), int(outgoing.sum())
    places = []
    for b, tree in enumerate(trees):
        in_trunk = tree.offset - first[b] + rows[b]
        if tree.branches:
            in_branch = total + starts[b][tree.branch] + tree.offset
            places.append(np.where(tree.branch < 0, in_trunk, in_branch))
        else:
            places.append(in_trunk)
    unique, source = np.unique(np.concatenate(places), return_inverse=True)
    return unique, source.astype(np.int64)


def _offsets(counts: Index) -> Index:
    """Return where each of the parts begins that lie one after the other."""
    return np.cumsum(counts) - counts


def _ranges(starts: Index, counts: Index) -> Index:
    """Return start .. start + count - 1 of each, one after the other."""
    shift = np.repeat(starts - _offsets(counts), counts)
    return shift + np.arange(int(counts.sum()))
