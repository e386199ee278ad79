"""Beginnings are shared where that saves tokens, and never a whole prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from archerchat.inference.scheduler import (
    MIN_SHARED,
    Scheduler,
    common_length,
    group_by_prefix,
)
from archerchat.inference.sequence import Request
from archerchat.model.transformer import Transformer

Prompt = Callable[[int], list[int]]


def test_common_beginnings() -> None:
    assert common_length([1, 2, 3, 7], [1, 2, 4, 5]) == 2
    assert common_length([1, 2], [1, 2, 3]) == 2
    assert common_length([], [1]) == common_length([2], [1]) == 0


def shares(prompts: Sequence[list[int]]) -> list[tuple[int, list[int]]]:
    return [(group.shared, group.members) for group in group_by_prefix(prompts)]


def test_prompts_that_begin_alike_are_grouped_in_order_of_their_oldest() -> None:
    long = list(range(40))
    prompts = [[5], [*long, 1], [7] * 30, [*long, 2, 3], [*[7] * 25, 1], [*long, 1]]
    assert shares(prompts) == [(0, [0]), (40, [1, 3, 5]), (25, [2, 4])]


def test_the_beginning_that_saves_most_is_shared() -> None:
    long = list(range(100))
    prompts = [[*long, 1], [*long, 2], [*long[:20], 3]]
    assert shares(prompts) == [(100, [0, 1]), (0, [2])], "100 tokens saved, not 2 * 20"
    prompts[2:] = [[*long[:60], n] for n in range(3)]
    assert shares(prompts) == [(60, [0, 1, 2, 3, 4])], "4 * 60 tokens saved, not 100 + 2 * 60"
    assert shares([[*long[:15], n] for n in range(9)]) == [(0, [n]) for n in range(9)], "short"


def test_a_thousand_prompts_may_each_begin_with_the_one_before() -> None:
    groups = group_by_prefix([[1] * length for length in range(1, 1001)])
    assert sorted(i for group in groups for i in group.members) == list(range(1000))
    assert sum(group.saved for group in groups) > 300_000


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20), min_size=1, max_size=15))
def test_every_prompt_is_in_one_group_and_has_its_beginning(prompts: list[list[int]]) -> None:
    groups = group_by_prefix(prompts)
    assert sorted(i for group in groups for i in group.members) == list(range(len(prompts)))
    assert [group.members[0] for group in groups] == sorted(min(g.members) for g in groups)
    for group in groups:
        assert group.shared == 0 or (group.shared >= MIN_SHARED and len(group.members) > 1)
        assert len({tuple(prompts[i][: group.shared]) for i in group.members}) == 1
        assert all(len(prompts[i]) >= group.shared for i in group.members)


def schedule_all(
    model: Transformer, prompts: Sequence[list[int]], places: int
) -> tuple[int, list[int]]:
    """Return how many prompt tokens ran, and the prompts' numbers in the order of their start."""
    scheduler = Scheduler(model)
    for number, prompt in enumerate(prompts):
        scheduler.add(number, Request(prompt))
    started = []
    while scheduler:
        found = scheduler.schedule(places)
        assert len(found) == min(places, len(prompts) - len(started))
        for waiting, sample in found:
            assert sample == 0
            assert waiting.prefix is not None
            assert waiting.prefix.length == len(waiting.request.prompt)
            started.append(waiting.number)
    assert sorted(started) == list(range(len(prompts)))
    return scheduler.prefilled_tokens, started


def test_a_whole_prompt_is_never_shared(model: Transformer, prompt: Prompt) -> None:
    """Its last token must run: its logits are wanted."""
    whole = prompt(40)
    assert schedule_all(model, [whole, whole], places=2) == (39 + 2, [0, 1])
    assert schedule_all(model, [whole, [*whole, 1, 2]], places=2) == (39 + 1 + 3, [0, 1])


def test_groups_are_served_in_order_of_their_oldest(model: Transformer, prompt: Prompt) -> None:
    """Two groups begin alike for 20 tokens, then differ; a third prompt stands alone."""
    common, alone = prompt(20), prompt(30)
    first, second = [*common, *prompt(40)], [*common, *prompt(60)]
    prompts = [[*first, 1], [*second, 1], [*first, 2], alone, [*second, 2, 3], [*first, 4]]
    tokens, started = schedule_all(model, prompts, places=2)
    assert tokens == (60 + 3) + (80 + 3) + 30
    assert started == [0, 2, 5, 1, 4, 3]


def test_a_prompt_that_leaves_its_group_does_not_pass_older_ones(
    model: Transformer, prompt: Prompt
) -> None:
    common = prompt(20)
    long = [*common, *prompt(40)]
    prompts = [[*long, 1], prompt(30), [*long, 2], prompt(30), [*common, 1], [*common, 2]]
    assert schedule_all(model, prompts, places=1)[1] == [0, 2, 1, 3, 4, 5]


def test_long_beginnings_under_a_short_one_are_shared(model: Transformer, prompt: Prompt) -> None:
    """A system message, ten subjects' examples after it, and thirty questions for each."""
    system = prompt(20)
    subjects = [[*system, *prompt(180)] for _ in range(10)]
    prompts = [[*subject, *prompt(8)] for subject in subjects for _ in range(30)]
    tokens, _ = schedule_all(model, prompts, places=8)
    assert tokens == 10 * (200 + 30 * 8)


def test_what_long_groups_leave_shares_the_short_beginning(
    model: Transformer, prompt: Prompt
) -> None:
    """A tree: of prompts with 30 tokens in common, some share 90 more, some 60, some nothing."""
    root = prompt(30)
    branches = [[*root, *prompt(n)] for n in (90, 60)]
    prompts = [[*branch, *prompt(5)] for _ in range(6) for branch in (root, *branches)]
    tokens, _ = schedule_all(model, prompts, places=4)
    assert tokens == (120 + 6 * 5) + (90 + 6 * 5) + (30 + 6 * 5)


@given(
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20), min_size=1, max_size=15)
)
def test_every_prompt_runs_once(model: Transformer, prompts: list[list[int]]) -> None:
    tokens, _ = schedule_all(model, prompts, places=4)
    assert tokens <= sum(map(len, prompts))


def test_a_request_can_be_taken_back_before_its_turn_and_in_it(
    model: Transformer, prompt: Prompt
) -> None:
    scheduler, common = Scheduler(model), prompt(30)
    for number in range(4):
        scheduler.add(number, Request([*common, number]))
    scheduler.add(4, Request(prompt(5)))
    assert [waiting.number for waiting, _ in scheduler.schedule(1)] == [0]
    assert scheduler.remove(2) is not None
    assert scheduler.remove(4) is not None
    assert scheduler.remove(4) is None
    assert len(scheduler) == 2
    assert [waiting.number for waiting, _ in scheduler.schedule(9)] == [1, 3]
    assert not scheduler
