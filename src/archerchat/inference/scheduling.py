"""Which waiting prompts run next, and which of them share a prefix.

Prompts that begin alike (few-shot examples, a system message) are grouped, so that the beginning
runs once for all of them. A group's prompts are served one after another, so that no more than
one shared prefix is kept at a time; groups are served in the order of their oldest prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_SHARED = 16
"""Tokens: running a prefix apart costs a pass of its own, which fewer would not pay for."""


@dataclass(frozen=True)
class PrefixGroup:
    """Prompts whose first `shared` tokens are the same."""

    shared: int
    """0 for a prompt alone; less than the shortest prompt's length."""
    members: tuple[int, ...]
    """Indices of prompts, ascending."""


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two prompts have in common at their beginnings."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def group_by_prefix(
    prompts: Sequence[Sequence[int]], least_shared: int = LEAST_SHARED
) -> list[PrefixGroup]:
    """Group prompts so that shared beginnings save as many tokens as they can.

    Sorted, prompts that begin alike stand side by side. Neighbours are joined from the longest
    common beginning down; where all of two clusters together save more with their shorter common
    beginning, (members - 1) * shared, than the two by themselves, they become one group.

    Returns:
        Groups in the order of their first member; every prompt is in one.
    """
    ordered = sorted(range(len(prompts)), key=lambda i: (list(prompts[i]), i))
    clusters = [_Cluster(0, [PrefixGroup(0, (i,))]) for i in ordered]
    place = list(range(len(ordered)))  # of each prompt's cluster: its leftmost prompt

    def cluster_of(i: int) -> int:
        while place[i] != i:
            place[i] = place[place[i]]
            i = place[i]
        return i

    def common(i: int) -> int:
        a, b = prompts[ordered[i]], prompts[ordered[i + 1]]
        # A prompt runs its last token at least itself: its logits are wanted.
        return min(common_length(a, b), len(a) - 1, len(b) - 1)

    pairs = sorted(((common(i), -i) for i in range(len(ordered) - 1)), reverse=True)
    for shared, index in pairs:
        if shared < least_shared:
            break
        left, right = cluster_of(-index), cluster_of(-index + 1)
        clusters[left] = clusters[left].joined(clusters[right], shared)
        place[right] = left
    found = [g for i, c in enumerate(clusters) if place[i] == i for g in c.groups]
    return sorted(found, key=lambda group: group.members[0])


@dataclass(frozen=True)
class _Cluster:
    """Prompts that begin alike, in one group or several."""

    saved: int
    """Tokens that its groups save."""
    groups: list[PrefixGroup]

    def joined(self, other: _Cluster, shared: int) -> _Cluster:
        """Return both, as one group with a common beginning or as they are, whatever saves more."""
        groups = self.groups + other.groups
        members = tuple(sorted(i for group in groups for i in group.members))
        together = (len(members) - 1) * shared
        if together > self.saved + other.saved:
            return _Cluster(together, [PrefixGroup(shared, members)])
        return _Cluster(self.saved + other.saved, groups)
