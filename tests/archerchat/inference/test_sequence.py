"""Requests that make no sense are refused with the value and the remedy."""

from __future__ import annotations

import pytest

from archerchat.errors import UsageError
from archerchat.inference.sequence import Completion, Event, Request, check_request


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        Request([])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1] * 8, "the prompt has 8 tokens and the context 8: cut it to 7 or fewer"),
        ([1] * 100, "the prompt has 100 tokens"),
        ([1, -1], "the prompt has token -1; the model knows 0 to 49"),
        ([1, 50], "the prompt has token 50; the model knows 0 to 49"),
    ],
)
def test_what_an_engine_cannot_serve_is_refused(prompt: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_request(Request(prompt), vocab_size=50, max_length=8)
    check_request(Request([0, 49] * 3 + [7]), vocab_size=50, max_length=8)


def test_a_completion_is_the_sum_of_its_events() -> None:
    completion = Completion()
    for event in (
        Event(0, 0, 5),
        Event(0, 0, 6, forced=True),
        Event(0, 0, None, finish_reason="stop", stop_token=9),
    ):
        completion.add(event)
    assert completion == Completion([5, 6], [1, 0], "stop", 9)
