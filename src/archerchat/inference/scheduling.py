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
    """Group prompts so that shared beginnings save about as many tokens as they can.

    Sorted, prompts that begin alike stand side by side; a prompt joins the group before it when
    the group then saves more, (members - 1) * shared, than it did.

    Returns:
        Groups in the order of their first member; every prompt is in one.
    """
    ordered = sorted(range(len(prompts)), key=lambda i: (list(prompts[i]), i))
    groups: list[tuple[int, list[int]]] = []
    for index in ordered:
        prompt = prompts[index]
        if groups:
            shared, members = groups[-1]
            # A prompt runs at least its last token itself: its logits are wanted.
            common = min(common_length(prompts[members[-1]], prompt), len(prompt) - 1)
            common = min(common, shared if len(members) > 1 else len(prompts[members[0]]) - 1)
            if common >= least_shared and len(members) * common > (len(members) - 1) * shared:
                members.append(index)
                groups[-1] = (common, members)
                continue
        groups.append((0, [index]))
    found = [
        PrefixGroup(shared if len(members) > 1 else 0, tuple(sorted(members)))
        for shared, members in groups
    ]
    return sorted(found, key=lambda group: group.members[0])
