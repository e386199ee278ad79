"""Lay a batch of trees out for `Transformer.hidden`: which tokens run, and who sees whom.

A batch is one flat row of tokens without padding: each tree's trunk and then its branches.
Attention takes it in blocks of queries, each with one range of keys that holds all that its queries
see, and a mask for the rest.

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

    incoming: Index
    """The tokens that come in, by their place in the layout."""
    kept: Index
    """The tokens that go out, by their place among `incoming`, ascending."""
    window: int
    """How far back a query sees, no larger than makes a difference."""
    blocks: tuple[tuple[slice, slice], ...]
    """Queries, a slice of `kept`, with their keys, a slice of `incoming`."""

    @property
    def keeps_all(self) -> bool:
        """Whether all tokens go out."""
        return np.array_equal(self.kept, np.arange(len(self.incoming)))


@dataclass(frozen=True)
class Layout:
    """A batch of trees. The last token may be repeated at the end; the copies are never read."""

    token_ids: Index
    """(N,) of the tokens that the first layer sees."""
    previous_ids: Index
    """(N,), the token before each, -1 where there is none."""
    positions: Index
    """(N,), position in the prompt."""
    tree: Index
    """(N,), each token's tree."""
    branch: Index
    """(N,), its branch, numbered over the batch; -1 in a trunk."""
    levels: tuple[Level, ...]
    """One per layer; layers that are alike share one."""
    sources: Index
    """For each scored token, the one that predicts it, among those that the last layer keeps."""
    targets: Index
    """The scored tokens."""
    options: Index
    """For each scored token its option, numbered over the batch."""

    def visible(self, level: Level, queries: slice, keys: slice) -> NDArray[np.bool_]:
        """Return which keys each query of a block sees, (queries, keys)."""
        places = level.kept[queries]
        rows, columns = level.incoming[places][:, None], level.incoming[keys]
        seen = np.arange(keys.start, keys.stop) <= places[:, None]
        seen &= self.tree[columns] == self.tree[rows]
        seen &= (self.branch[columns] < 0) | (self.branch[columns] == self.branch[rows])
        seen &= self.positions[columns] >= self.positions[rows] - level.window
        return seen


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
    branch = np.concatenate([tree.branch for tree in trees])
    position = np.concatenate([tree.positions for tree in trees])
    # How many of the trunk's last tokens must run for this one to be among them; 0 in branches.
    depth = np.repeat([tree.trunk_length for tree in trees], sizes) - position
    depth = np.where(branch < 0, depth, 0)
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
            trunk_end = (starts + needed[:, i])[of_query]
            reach = np.maximum(starts[of_query], np.minimum(kept, trunk_end) - window)
            blocks = tuple(_iter_blocks(kept, reach, block))
            made[key] = Level(incoming, kept, window, blocks)
        levels.append(made[key])
        incoming = incoming[levels[-1].kept]

    sources = [tree.sources + start for tree, start in zip(trees, _starts(sizes), strict=True)]
    options = [tree.options + start for tree, start in zip(trees, first_option, strict=True)]
    return Layout(
        token_ids=np.concatenate([tree.token_ids for tree in trees])[chosen].astype(np.int64),
        previous_ids=np.concatenate([tree.previous_ids for tree in trees])[chosen].astype(np.int64),
        positions=position.astype(np.int64),
        tree=owner,
        branch=np.where(depth > 0, -1, branch[chosen] + first_option[owner]),
        levels=tuple(levels),
        sources=np.searchsorted(chosen[incoming], np.concatenate(sources)),
        targets=np.concatenate([tree.targets for tree in trees]).astype(np.int64),
        options=np.concatenate(options),
    )


def _iter_blocks(kept: Index, reach: Index, block: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of queries, each with the range of keys that they see.

    Args:
        kept: each query's own place among the keys, ascending.
        reach: the first key that each sees.
    """
    for start in range(0, len(kept), block):
        stop = min(start + block, len(kept))
        yield slice(start, stop), slice(int(reach[start:stop].min()), int(kept[stop - 1]) + 1)


def _starts(sizes: Sequence[int] | Index) -> Index:
    """Return where each part begins when parts of these sizes follow one another."""
    starts: Index = np.cumsum(sizes) - np.asarray(sizes)
    return starts


def _rounded(places: Index) -> Index:
    """Repeat the last place until their number is a multiple of `ROWS`."""
    rounded: Index = np.pad(places, (0, -len(places) % ROWS), mode="edge")
    return rounded
