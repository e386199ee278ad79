"""Shared beginnings are found, worth it, and never a whole prompt."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from archerchat.inference.scheduler import PrefixGroup, common_length, group_by_prefix

SHARED = list(range(100, 140))


def test_common_beginnings() -> None:
    assert common_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_length([1, 2], [1, 2, 3]) == 2
    assert common_length([], [1]) == common_length([2], [1]) == 0


def test_prompts_that_begin_alike_are_grouped_in_order_of_their_oldest() -> None:
    prompts = [[5], [*SHARED, 1], [7] * 30, [*SHARED, 2, 3], [*[7] * 25, 1], [*SHARED, 1]]
    assert group_by_prefix(prompts) == [
        PrefixGroup(0, (0,)),
        PrefixGroup(40, (1, 3, 5)),
        PrefixGroup(25, (2, 4)),
    ]


def test_a_whole_prompt_is_never_shared() -> None:
    """Its last token must run: its logits are wanted."""
    assert group_by_prefix([SHARED, SHARED]) == [PrefixGroup(39, (0, 1))]
    assert group_by_prefix([SHARED, [*SHARED, 1, 2]]) == [PrefixGroup(39, (0, 1))]


def test_short_beginnings_are_not_worth_a_pass() -> None:
    prompts = [[1, 2, 3, n] for n in range(5)]
    assert [group.shared for group in group_by_prefix(prompts)] == [0] * 5
    assert group_by_prefix(prompts, min_shared=3) == [PrefixGroup(3, (0, 1, 2, 3, 4))]


def test_a_long_beginning_is_not_given_up_for_a_short_one() -> None:
    """Two prompts that share 100 tokens, one that shares 20 of them: 100 saved beats 2 * 20."""
    long = list(range(100))
    prompts = [[*long, 1], [*long, 2], [*long[:20], 3]]
    assert group_by_prefix(prompts) == [PrefixGroup(100, (0, 1)), PrefixGroup(0, (2,))]


def test_a_thousand_prompts_may_each_begin_with_the_one_before() -> None:
    groups = group_by_prefix([[1] * length for length in range(1, 1001)])
    assert sorted(i for group in groups for i in group.members) == list(range(1000))
    assert max(groups, key=lambda group: group.shared * len(group.members)).shared > 400


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), max_size=15))
def test_every_prompt_is_in_one_group_and_has_its_beginning(prompts: list[list[int]]) -> None:
    groups = group_by_prefix(prompts, min_shared=2)
    assert sorted(i for group in groups for i in group.members) == list(range(len(prompts)))
    assert [group.members[0] for group in groups] == sorted(group.members[0] for group in groups)
    for group in groups:
        first = prompts[group.members[0]]
        assert group.shared == 0 or (group.shared >= 2 and len(group.members) > 1)
        for member in group.members:
            assert len(prompts[member]) > group.shared
            assert prompts[member][: group.shared] == first[: group.shared]
