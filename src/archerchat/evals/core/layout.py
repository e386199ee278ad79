"""Lay a batch of trees out for `Transformer.hidden`: which tokens run, and who sees whom.

A batch is one flat row of tokens without padding: each tree's trunk and then its branches. A query
sees two ranges of keys, in its trunk and in its branch. Attention takes the row in blocks of
queries, each with one range of keys that holds all that its queries see, and a mask for the rest.

Nothing is computed that no score depends on. The last layer needs queries at the scored positions
and keys as far back as its window; the layer below needs outputs there; and so on down. With
windows of 128 the first layers of a 1000-token prompt are run on a few hundred tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from archerchat.evals.core.prompts import Tree

Index = NDArray[np.int64]

ROWS = 64
"""Rows come in multiples of this: on CPUs every new number of rows costs a product its plan."""


@dataclass(frozen=True)
class Level:
    """One layer: the tokens that come in and go out, and its blocks of attention."""

    kept: Index
    """(n,): the tokens that go out, by their place among those that come in, ascending."""
    keeps_all: bool
    """Whether all tokens go out."""
    ranges: Index
    """(4, n): the keys that each kept token sees, as places among the tokens that come in: first
    and end in its trunk, first and end in its branch. A token of a trunk sees none in a branch."""
    blocks: tuple[tuple[slice, slice], ...]
    """Queries, a slice of `kept`, with their keys, a slice of the tokens that come in."""


@dataclass(frozen=True)
class Layout:
    """A batch of trees. The last token may be repeated at the end; the copies are never read."""

    token_ids: Index
    """(N,) of the tokens that the first layer sees."""
    previous_ids: Index
    """(N,), the token before each, -1 where there is none."""
    positions: Index
    """(N,), position in the prompt."""
    levels: tuple[Level, ...]
    """One per layer; layers that are alike share one."""
    sources: Index
    """For each scored token, the one that predicts it, among those that the last layer keeps."""
    targets: Index
    options: Index
    """For each scored token its option, numbered over the batch."""


def needed_trunk(tree: Tree, windows: Sequence[int]) -> list[int]:
    """Return how many of a trunk's last tokens come into each layer, and go out of the last."""
    scored = tree.sources[tree.sources < tree.trunk_length]
    needed = [tree.trunk_length - int(scored.min()) if len(scored) else 0]
    for window in reversed(windows):
        queries = needed[-1]
        has_queries = queries or len(tree.token_ids) > tree.trunk_length
        needed.append(min(tree.trunk_length, queries + window) if has_queries else 0)
    return needed[::-1]


def tokens_to_run(tree: Tree, windows: Sequence[int]) -> int:
    """Return how many tokens the first layer sees of a tree."""
    return needed_trunk(tree, windows)[0] + len(tree.token_ids) - tree.trunk_length


def build_layout(trees: Sequence[Tree], windows: Sequence[int], block: int) -> Layout:
    """Lay out a batch.

    Args:
        windows: for each layer the w such that a query at t sees keys t-w .. t.
        block: the most queries that attend together.
    """
    needed = np.array([needed_trunk(tree, windows) for tree in trees])  # (B, L + 1)
    sizes = np.array([len(tree.token_ids) for tree in trees])
    first_option = _starts([len(tree.lengths) for tree in trees])
    owner = np.repeat(np.arange(len(trees)), sizes)
    position = np.concatenate([tree.positions for tree in trees])
    # Distance from the trunk's end: 1 for its last token, 0 for the first of a branch, then -1.
    depth = np.repeat([tree.trunk_length for tree in trees], sizes) - position
    chosen = _rounded(np.flatnonzero(depth <= needed[owner, 0]))
    owner, depth, position = owner[chosen], depth[chosen], position[chosen]

    levels: list[Level] = []
    made: dict[tuple[int, int, int], Level] = {}
    incoming = np.arange(len(chosen))
    alive = [depth <= needed[owner, i] for i in range(len(windows) + 1)]
    for i, window in enumerate(windows):
        window = min(window, int(position.max()))
        # Tokens only drop out from layer to layer, so equal numbers are equal tokens.
        key = window, int(alive[i].sum()), int(alive[i + 1].sum())
        if key not in made:
            kept = _rounded(np.flatnonzero(alive[i + 1][incoming]))
            starts = np.searchsorted(owner[incoming], np.arange(len(trees)))
            of_query = owner[incoming[kept]]
            trunk_start, trunk_end = starts[of_query], (starts + needed[:, i])[of_query]
            ranges = _ranges(kept, trunk_start, trunk_end, depth[incoming[kept]], window)
            keeps_all = np.array_equal(kept, np.arange(len(incoming)))
            made[key] = Level(kept, keeps_all, ranges, tuple(_iter_blocks(ranges, block)))
        levels.append(made[key])
        incoming = incoming[levels[-1].kept]

    sources = [tree.sources + start for tree, start in zip(trees, _starts(sizes), strict=True)]
    options = [tree.options + start for tree, start in zip(trees, first_option, strict=True)]
    return Layout(
        token_ids=np.concatenate([tree.token_ids for tree in trees])[chosen].astype(np.int64),
        previous_ids=np.concatenate([tree.previous_ids for tree in trees])[chosen].astype(np.int64),
        positions=position.astype(np.int64),
        levels=tuple(levels),
        sources=np.searchsorted(chosen[incoming], np.concatenate(sources)),
        targets=np.concatenate([tree.targets for tree in trees]).astype(np.int64),
        options=np.concatenate(options),
    )


def _ranges(kept: Index, start: Index, end: Index, depth: Index, window: int) -> Index:
    """Return which keys queries see, as `Level.ranges`.

    Args:
        kept: each query's own place among the keys.
        start, end: the places where its trunk starts and ends.
        depth: its distance from the trunk's end, as in `build_layout`.
    """
    place = end - depth  # if no other branch stood between its own and the trunk
    skipped = kept - place
    first = np.maximum(start, place - window)
    in_branch = np.minimum(np.maximum(first, end) + skipped, kept + 1)
    return np.stack([first, np.minimum(place + 1, end), in_branch, kept + 1])


def _iter_blocks(ranges: Index, block: int) -> Iterator[tuple[slice, slice]]:
    reach = np.where(ranges[0] < ranges[1], ranges[0], ranges[2])
    for start in range(0, len(reach), block):
        stop = min(start + block, len(reach))
        yield slice(start, stop), slice(int(reach[start:stop].min()), int(ranges[3, stop - 1]))


def _starts(sizes: Sequence[int] | Index) -> Index:
    """Return where each part begins when parts of these sizes follow one another."""
    starts: Index = np.cumsum(sizes) - np.asarray(sizes)
    return starts


def _rounded(places: Index) -> Index:
    """Repeat the last place until their number is a multiple of `ROWS`."""
    rounded: Index = np.pad(places, (0, -len(places) % ROWS), mode="edge")
    return rounded
