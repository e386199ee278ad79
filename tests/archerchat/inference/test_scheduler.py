"""Beginnings are shared where that saves tokens, and never a whole prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archerchat.inference.scheduler import Scheduler, common_length, most_saving
from archerchat.inference.sequence import Request
from archerchat.model.transformer import Transformer

Prompt = Callable[[int], list[int]]


def test_common_beginnings() -> None:
    assert common_length([1, 2, 3, 7], [1, 2, 4, 5]) == 2
    assert common_length([1, 2], [1, 2, 3]) == 2
    assert common_length([], [1]) == common_length([2], [1]) == 0


@pytest.mark.parametrize(
    ("lengths", "length"),
    [
        ([], 0),
        ([15, 15, 15], 0),  # not worth a pass
        ([40, 3, 40], 40),
        ([100, 20], 100),  # 100 tokens saved, against 2 * 20
        ([100, 60], 60),
    ],
)
def test_the_beginning_that_saves_most_is_shared(lengths: list[int], length: int) -> None:
    assert most_saving(lengths) == length


def schedule_all(model: Transformer, prompts: Sequence[list[int]], places: int) -> tuple[int, int]:
    """Return how many prompt tokens ran, and the number of the prompt that started last."""
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
    return scheduler.prefilled_tokens, started[-1]


def test_a_whole_prompt_is_never_shared(model: Transformer, prompt: Prompt) -> None:
    """Its last token must run: its logits are wanted."""
    whole = prompt(40)
    assert schedule_all(model, [whole, whole], places=2) == (39 + 2, 1)
    assert schedule_all(model, [whole, [*whole, 1, 2]], places=2) == (39 + 1 + 3, 1)


def test_groups_are_served_in_order_of_their_oldest(model: Transformer, prompt: Prompt) -> None:
    """Two groups begin alike for 20 tokens, then differ; a third prompt stands alone."""
    common, alone = prompt(20), prompt(30)
    first, second = [*common, *prompt(40)], [*common, *prompt(60)]
    prompts = [[*first, 1], [*second, 1], [*first, 2], alone, [*second, 2, 3], [*first, 4]]
    tokens, last = schedule_all(model, prompts, places=2)
    assert tokens == (60 + 3) + (80 + 3) + 30
    assert last == 3


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
