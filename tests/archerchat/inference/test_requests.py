"""Requests that make no sense are refused with the number and the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from archerchat.errors import UsageError
from archerchat.inference.requests import Completion, Event, Request, check_request


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"max_new_tokens": -5}, "max_new_tokens is -5"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0, or"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-9}, "temperature is 1e-09"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"seed": -1}, "seed is -1; it must be from 0"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Request(**({"prompt": [1], "max_new_tokens": 1} | changes))


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
        check_request(Request(prompt, 1), vocab_size=50, max_length=8)
    check_request(Request([0, 49] * 3 + [7], 1), vocab_size=50, max_length=8)


def test_a_completion_is_the_sum_of_its_events() -> None:
    completion = Completion()
    for event in (
        Event(0, 0, 5),
        Event(0, 0, 6, forced=True),
        Event(0, 0, None, finish_reason="stop", stop_token=9),
    ):
        completion.add(event)
    assert completion == Completion([5, 6], [1, 0], "stop", 9)
