"""From an answer's tokens to its parts, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from archerchat.inference.answers import AnswerReader, Piece, read_parts, spoken_text

ANSWER = (
    "So ",
    *("<|python_start|>", "6*7", "<|python_end|>"),
    *("<|output_start|>", "42", "<|output_end|>"),
    "is é",
)


@pytest.fixture(scope="module")
def speaker(scripted: Callable[[Sequence[str]], Any]) -> Any:
    """Something with a tokenizer of single bytes and `ids`."""
    return scripted(["a"])


def test_parts_of_an_answer(speaker: Any) -> None:
    ids = speaker.ids(ANSWER)
    assert read_parts(speaker.tokenizer, ids) == [
        {"type": "text", "text": "So "},
        {"type": "python", "text": "6*7"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "is é"},
    ]
    assert spoken_text(speaker.tokenizer, ids) == "So is é"
    assert read_parts(speaker.tokenizer, []) == []


def test_characters_come_whole(speaker: Any) -> None:
    reader = AnswerReader(speaker.tokenizer)
    shown = [reader.read(token) for token in speaker.ids(["aé€😀"])]
    texts = ["".join(piece.text for piece in pieces) for pieces in shown]
    assert texts == ["a", "", "é", "", "", "€", "", "", "", "😀"]
    assert reader.finish() == []


def test_what_never_becomes_a_character_is_shown_in_the_end(speaker: Any) -> None:
    reader = AnswerReader(speaker.tokenizer)
    assert reader.read(0xE2) == []
    assert reader.finish() == [Piece("text", "\ufffd", True)]
    # Nor does it hold up what follows for ever.
    reader = AnswerReader(speaker.tokenizer)
    pieces = [piece for _ in range(5) for piece in reader.read(0xFF)]
    assert "".join(piece.text for piece in pieces).startswith("\ufffd" * 4)


def test_pieces_say_where_parts_begin(speaker: Any) -> None:
    reader = AnswerReader(speaker.tokenizer)
    words = ["ab", "<|python_start|>", "1", "<|python_end|>", "<|python_start|>", "2"]
    pieces = [piece for token in speaker.ids(words) for piece in reader.read(token)]
    assert pieces == [
        Piece("text", "a", True),
        Piece("text", "b"),
        Piece("python", "1", True),
        Piece("python", "2", True),
    ]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["<|python_end|>", "a"], [("text", "a")]),  # an end where nothing is open
        (["a", "<|output_end|>", "b"], [("text", "ab")]),
        (["<|python_start|>", "1"], [("python", "1")]),  # never closed
        (["<|python_start|>", "<|python_end|>", "a"], [("text", "a")]),  # empty
        (["a", "<|user_start|>"], [("text", "a<|user_start|>")]),
    ],
)
def test_answers_out_of_order(speaker: Any, words: list[str], parts: list[tuple[str, str]]) -> None:
    found = read_parts(speaker.tokenizer, speaker.ids(words))
    assert [(each["type"], each["text"]) for each in found] == parts
