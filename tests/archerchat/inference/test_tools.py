"""Parts of an answer, piece by piece; the calculator's results where an expression has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Request
from archerchat.inference.tools import (
    AnswerReader,
    Piece,
    ToolUse,
    read_parts,
    spoken_text,
)
from archerchat.model.config import ModelConfig
from archerchat.tokenizer.bpe import Tokenizer

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


def test_a_stop_string_ends_the_reading(speaker: Any) -> None:
    words = ["So ", "<|python_start|>", "6*7", "<|python_end|>", "it is\nUser: hi"]
    ids = speaker.ids(words)
    parts = read_parts(speaker.tokenizer, ids, ("\nUser:",))
    assert [part["text"] for part in parts] == ["So ", "6*7", "it is"]
    assert spoken_text(speaker.tokenizer, ids, ("6*7",)) == "So "
    # What might have become a stop string is shown at the end of a part.
    assert spoken_text(speaker.tokenizer, ids, ("So long", "hippo")) == "So it is\nUser: hi"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer({bytes([value]): value for value in range(256)})


Say = Callable[..., list[str]]


@pytest.fixture
def say(tokenizer: Tokenizer) -> Say:
    """Feed a hook texts and special tokens; return what it forced after each token, as text."""

    def feed(*pieces: str, evaluate: Callable[[str], str | None]) -> list[str]:
        hook = ToolUse(tokenizer, evaluate)
        forced = []
        for piece in pieces:
            ids = [tokenizer.special_id(piece)] if piece[:2] == "<|" else tokenizer.encode(piece)
            forced += [tokenizer.decode(list(hook(token))) for token in ids]
        return [text for text in forced if text]

    return feed


def test_a_value_is_forced_between_its_two_tokens(say: Say) -> None:
    asked: list[str] = []

    def evaluate(expression: str) -> str:
        asked.append(expression)
        return "84"

    forced = say("It is ", "<|python_start|>", "12*7", "<|python_end|>", ".", evaluate=evaluate)
    assert forced == ["<|output_start|>84<|output_end|>"]
    assert asked == ["12*7"]


def test_without_a_value_nothing_is_forced(say: Say) -> None:
    words = ("<|python_start|>", "import os", "<|python_end|>", "x")
    assert say(*words, evaluate=lambda _: None) == []


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["1+1", "<|python_end|>"], []),  # never begun
        (["<|python_start|>", "1+1"], []),  # never ended
        (["<|python_start|>", "<|python_end|>"], [""]),
        (["<|python_start|>", "1", "<|python_end|>", "2", "<|python_end|>"], ["1"]),
        (["<|python_start|>", "1", "<|python_start|>", "2", "<|python_end|>"], ["2"]),
        (["<|python_start|>", "1", "<|python_end|>"] * 2, ["1", "1"]),
        (["<|python_start|>", "é語", "<|python_end|>"], ["é語"]),
        (["<|python_start|>", "a", "<|user_end|>", "<|python_end|>"], ["a<|user_end|>"]),
    ],
)
def test_what_counts_as_an_expression(say: Say, words: list[str], asked: list[str]) -> None:
    heard: list[str] = []
    say(*words, evaluate=lambda text: heard.append(text))
    assert heard == asked


def test_special_token_text_in_a_value_is_text(tokenizer: Tokenizer) -> None:
    hook = ToolUse(tokenizer, lambda _: "<|assistant_end|>")
    hook(tokenizer.special_id("<|python_start|>"))
    forced = hook(tokenizer.special_id("<|python_end|>"))
    assert list(forced[1:-1]) == list(b"<|assistant_end|>")


def test_each_row_has_a_state_of_its_own(tokenizer: Tokenizer) -> None:
    tool = partial(ToolUse, tokenizer, lambda text: text)
    start, end = (tokenizer.special_id(f"<|python_{name}|>") for name in ("start", "end"))
    one, other = tool(), tool()
    one(start)
    one(ord("1"))
    assert other(end) == ()
    assert list(one(end)[1:-1]) == [ord("1")]


@pytest.mark.parametrize("overlap", [False, True])
def test_an_engine_forces_it_into_the_row(build: Any, tokenizer: Tokenizer, overlap: bool) -> None:
    """A model that can only write `<|python_start|> <|python_end|>` in turns, whatever is said."""
    model = build(ModelConfig(64, tokenizer.vocab_size, 2, 2, 2, 32))
    start, end = (tokenizer.special_id(f"<|python_{name}|>") for name in ("start", "end"))
    for table in (model.token_embedding, *model.value_embeddings.values()):
        table.weight.zero_()
    model.smear_lambda.zero_()
    model.backout_lambda.zero_()
    model.token_embedding.weight[:, 0] = 1
    model.token_embedding.weight[start] = -model.token_embedding.weight[end]
    for block in model.blocks:
        block.attention.output.weight.zero_()
        block.mlp.down.weight.zero_()
    model.unembedding.weight.zero_()
    model.unembedding.weight[start, 0], model.unembedding.weight[end, 0] = 1, -1
    hook = partial(ToolUse, tokenizer, lambda text: f"[{text}]")
    request = Request([tokenizer.bos_id], SamplingParams(12, temperature=0), hook)
    (completion,) = Engine(model, overlap=overlap).generate([request])[0]
    text = "".join(tokenizer.decode([token]) for token in completion.token_ids)
    turn = "<|python_start|><|python_end|><|output_start|>[]<|output_end|>"
    assert text == turn * 2
    assert completion.mask == [1, 1, 0, 0, 0, 0] * 2
