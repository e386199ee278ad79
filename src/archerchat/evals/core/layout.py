"""Where each token of a batch of trees lies, layer by layer, and who attends to whom.

A batch is a flat list of tokens without padding: each tree's trunk and then its branches. Linear
layers run over the list as it is. Attention takes it in blocks of queries, each with one range of
keys that holds all that its queries see and a mask for the rest: a block is a part of a long
trunk, the branches of one tree, or several small trees.

Nothing is computed that no score depends on. The last layer needs queries at the scored positions
and keys as far back as its window; the layer below needs outputs there; and so on down. With
windows of 128 the first layers of a 1000-token prompt are run on a few hundred tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from archerchat.evals.core.prompts import Ids, Tree

Index = NDArray[np.int64]


@dataclass(frozen=True)
class QueryBlock:
    """Queries that attend together, and the keys that they attend to."""

    queries: slice
    """Among the tokens that go out of the layer."""
    keys: slice
    """Among the tokens that come in."""
    is_band: bool
    """Whether all of it is one trunk; the last query then is the last key's."""


@dataclass(frozen=True)
class Level:
    """One layer."""

    kept: Index | None
    """The incoming tokens that go out; None is all of them."""
    incoming: Index
    """The tokens that come in, among those of the first layer."""
    outgoing: Index
    """Likewise those that go out."""
    window: int
    """No larger than makes a difference."""
    blocks: tuple[QueryBlock, ...]


@dataclass(frozen=True)
class Layout:
    """A batch of trees, laid out."""

    token_ids: Index
    """(N,) of the tokens that the first layer sees."""
    previous_ids: Index
    """(N,) of the token before each, -1 where there is none."""
    positions: Index
    """(N,)."""
    tree: Index
    """(N,), each token's tree."""
    branch: Index
    """(N,), its branch, numbered over the batch; -1 in a trunk."""
    levels: tuple[Level, ...]
    """A layer each; layers that are alike share one."""
    scored: Index
    """The tokens that give logits, among those that go out of the last layer."""
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
        needed.append(min(length, reach))
    return needed[::-1]


def tokens_to_run(tree: Tree, windows: Sequence[int]) -> int:
    """Return how many tokens the first layer sees of a tree."""
    return needed_trunk(tree, windows)[0] + sum(map(len, tree.branches))


def build_layout(trees: Sequence[Tree], windows: Sequence[int], block: int) -> Layout:
    """Lay out a batch.

    Args:
        windows: for each layer the w such that a query at t sees keys t-w .. t.
        block: the most queries that attend together.
    """
    needed = np.array([needed_trunk(tree, windows) for tree in trees]).T  # (L + 1, B)
    branched = np.array([sum(map(len, tree.branches)) for tree in trees])
    deepest = max(len(tree.trunk) + max(map(len, tree.branches), default=0) for tree in trees)
    levels: list[Level] = []
    tokens = np.arange(int(needed[0].sum() + branched.sum()))
    made: dict[tuple[int, bytes, bytes], Level] = {}
    for i, window in enumerate(windows):
        reach = min(window, deepest)
        incoming, outgoing = needed[i], needed[i + 1]
        key = reach, incoming.tobytes(), outgoing.tobytes()
        if key not in made:
            kept = None
            if (incoming != outgoing).any():
                ends = np.cumsum(incoming + branched)
                kept = _ranges(ends - branched - outgoing, outgoing + branched)
            blocks = tuple(_iter_blocks(incoming, outgoing, branched, reach, block))
            remaining = tokens if kept is None else tokens[kept]
            made[key] = Level(kept, tokens, remaining, reach, blocks)
        levels.append(made[key])
        tokens = made[key].outgoing
    scored, source = _scored(trees, needed[-1], branched)
    options = _offsets(np.array([len(tree.lengths) for tree in trees]))
    pair_option = [tree.option + first for tree, first in zip(trees, options, strict=True)]
    order = np.argsort(source, kind="stable")
    return Layout(
        **_tokens(trees, needed[0]),
        levels=tuple(levels),
        scored=scored,
        pair_source=source[order],
        pair_target=np.concatenate([tree.target for tree in trees]).astype(np.int64)[order],
        pair_option=np.concatenate(pair_option)[order],
    )


def _tokens(trees: Sequence[Tree], needed: Index) -> dict[str, Index]:
    """Return the layout's fields that describe its tokens, by name."""
    ids: list[Ids | Index] = []
    previous: list[Ids | Index] = []
    positions, owners, branches = [], [], []
    none = np.array([-1])
    number = 0
    for b, (tree, count) in enumerate(zip(trees, needed, strict=True)):
        trunk, length = tree.trunk, len(tree.trunk)
        start = length - count
        ids.append(trunk[start:])
        previous += [trunk[start - 1 : -1]] if start else [none[:count], trunk[:-1]]
        positions.append(np.arange(start, length))
        branches.append(np.full(count, -1))
        for branch in tree.branches:
            ids.append(branch)
            previous += [trunk[-1:], branch[:-1]]
            positions.append(np.arange(length, length + len(branch)))
            branches.append(np.full(len(branch), number))
            number += 1
        owners.append(np.full(count + sum(map(len, tree.branches)), b))
    parts = {
        "token_ids": ids,
        "previous_ids": previous,
        "positions": positions,
        "tree": owners,
        "branch": branches,
    }
    return {name: np.concatenate(part).astype(np.int64) for name, part in parts.items()}


def _iter_blocks(
    incoming: Index, outgoing: Index, branched: Index, window: int, block: int
) -> Iterator[QueryBlock]:
    """Yield a layer's blocks in the order of their queries.

    Trees of few queries and keys go together: what they hide from each other costs less than
    blocks of their own.

    Args:
        incoming: (B,) trunk tokens that come into the layer; outgoing: that go out.
        branched: (B,) tokens in branches.
    """
    query = key = 0  # where the tree begins among those that go out and those that come in
    pack: tuple[int, int] | None = None  # where the running block of small trees begins
    for count, queries, branch in zip(
        incoming.tolist(), outgoing.tolist(), branched.tolist(), strict=True
    ):
        next_query, next_key = query + queries + branch, key + count + branch
        small = next_query - query <= block // 2 and next_key - key <= 2 * block
        if pack and not (
            small and next_query - pack[0] <= block and next_key - pack[1] <= 4 * block
        ):
            yield QueryBlock(slice(pack[0], query), slice(pack[1], key), False)
            pack = None
        if small:
            pack = pack or (query, key)
        else:
            trunk_end = key + count
            for start in range(0, queries, block):
                stop = min(start + block, queries)
                shift = trunk_end - queries  # from a query's place to its key's
                keys = slice(max(key, shift + start - window), shift + stop)
                yield QueryBlock(slice(query + start, query + stop), keys, True)
            first, start = max(key, trunk_end - window), query + queries
            for step in range(0, branch, block):
                stop = min(step + block, branch)
                keys = slice(first, trunk_end + stop)
                yield QueryBlock(slice(start + step, start + stop), keys, False)
        query, key = next_query, next_key
    if pack:
        yield QueryBlock(slice(pack[0], query), slice(pack[1], key), False)


def _scored(trees: Sequence[Tree], outgoing: Index, branched: Index) -> tuple[Index, Index]:
    """Return the tokens that give logits, without repetition, and each target's place there.

    Args:
        outgoing: (B,) trunk tokens that go out of the last layer; branched: (B,) tokens in
            branches.
    """
    places = []
    for tree, start, count in zip(
        trees, _offsets(outgoing + branched).tolist(), outgoing.tolist(), strict=True
    ):
        trunk_end = start + count
        first = np.cumsum([0, *map(len, tree.branches)]) + trunk_end
        in_trunk = trunk_end - len(tree.trunk) + tree.offset
        places.append(np.where(tree.branch < 0, in_trunk, first[tree.branch] + tree.offset))
    unique, source = np.unique(np.concatenate(places), return_inverse=True)
    return unique, source.astype(np.int64)


def _offsets(counts: Index) -> Index:
    """Return where each of the parts begins that lie one after the other."""
    return np.cumsum(counts) - counts


def _ranges(starts: Index, counts: Index) -> Index:
    """Return start .. start + count - 1 of each, one after the other."""
    shift = np.repeat(starts - _offsets(counts), counts)
    return shift + np.arange(int(counts.sum()))
