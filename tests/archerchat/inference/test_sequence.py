"""Sequences: what they say, where they end; requests that make no sense are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archerchat.errors import UsageError
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import (
    Completion,
    Detokenizer,
    Event,
    Request,
    Sequence,
    TokenLogprobs,
)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        Request([])


def test_a_completion_is_the_sum_of_its_events() -> None:
    completion = Completion()
    for event in (
        Event(0, 0, 5),
        Event(0, 0, 6, forced=True),
        Event(0, 0, None, finish_reason="stop", stop_token=9),
    ):
        completion.add(event)
    assert completion == Completion([5, 6], [1, 0], "stop", 9)


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def read_all(data: bytes, *stops: str) -> tuple[list[str], bool]:
    """Return what a detokenizer says after each byte, the rest last, and whether it stopped."""
    reader = Detokenizer(decode, stops)
    return [*(reader.read(value) for value in data), reader.finish()], reader.stopped


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    assert read_all(b"a\n\nQ: b", "\n\nQ:") == (["a", *[""] * 6, ""], True)
    pieces = ["a", "", "", "\n\nb", "", "\nc", "", "", "\n\n"]
    assert read_all(b"a\n\nb\nc\n\n", "\n\nQ:") == (pieces, False)


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (("abcd", "bc"), "xa"),  # `bc` is complete first
        (("c", "bc"), "xa"),  # complete together: the longer one
        (("é",), "xabcd"),
        (("zz",), "xabcdéy"),
    ],
)
def test_the_stop_string_that_is_complete_first_counts(stops: tuple[str, ...], text: str) -> None:
    pieces, stopped = read_all("xabcdéy".encode(), *stops)
    assert ("".join(pieces), stopped) == (text, text != "xabcdéy")


@given(st.text("ab\u20ac", max_size=30), st.lists(st.text("ab\u20ac", min_size=1, max_size=4)))
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text: str, stops: list[str]) -> None:
    """One byte at a time, as from a tokenizer of bytes, or all at once."""
    pieces, stopped = read_all(text.encode(), *stops)
    whole = Detokenizer(lambda ids: text if ids else "", stops)
    assert whole.read(0) + whole.finish() == "".join(pieces)
    places = [(text.find(each) + len(each), text.find(each)) for each in stops if each in text]
    assert whole.stopped == stopped == bool(places)
    assert "".join(pieces) == (text[: min(places)[1]] if places else text)


def test_a_stop_string_ends_a_sequence_and_is_not_part_of_its_text() -> None:
    params = SamplingParams(50, stop=("!?",))
    sequence = Sequence(3, 1, Request([0], params, decode=decode), 99)
    completion = Completion()
    for value in b"ab!c!?":
        assert sequence.needs_step
        sequence.num_drawn += 1
        completion.add(sequence.read(value))
    assert sequence.finished
    assert not sequence.needs_step
    assert completion == Completion(list(b"ab!c!?"), [1] * 6, "stop", None, "ab!c")


def test_held_text_is_released_where_a_sequence_ends_in_another_way() -> None:
    request = Request([0], SamplingParams(3, stop=("bcd",), stop_token_ids=(9,)), decode=decode)
    cases: list[tuple[list[int], str, int | None]] = [
        (list(b"abc"), "max_tokens", None),
        ([*b"ab", 9], "stop", 9),
    ]
    for values, reason, stop_token in cases:
        sequence, completion = Sequence(0, 0, request, 99), Completion()
        for value in values:
            completion.add(sequence.read(value))
        assert completion.text == decode([value for value in values if value != 9])
        assert (completion.finish_reason, completion.stop_token) == (reason, stop_token)
    sequence = Sequence(0, 0, request, 99)
    assert sequence.read(ord("b")).text == ""
    assert sequence.cancel().text == "b"
    assert sequence.finished


def test_log_probabilities_are_cut_to_what_was_asked_and_none_for_forced_tokens() -> None:
    record = [-0.5, *(-0.1, -0.5, -4.0), *(7.0, 8.0, 9.0)]
    request = Request([0], SamplingParams(9, logprobs=2), hook=lambda: lambda token: [5])
    sequence, completion = Sequence(0, 0, request, 99), Completion()
    for _ in range(3):
        completion.add(sequence.read(8, record))
    kept = TokenLogprobs(-0.5, ((7, -0.1), (8, -0.5)))
    assert completion.token_ids == [8, 5, 8]
    assert completion.logprobs == [kept, None, kept]
    silent = Sequence(0, 0, Request([0]), 99)
    assert silent.read(8, record).logprobs is None


def test_stop_strings_need_a_decoder() -> None:
    with pytest.raises(AssertionError, match="decode"):
        Request([0], SamplingParams(stop=("x",)))
