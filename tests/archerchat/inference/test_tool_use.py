"""The calculator's answers appear after an expression that has one, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from archerchat.inference.engine import Engine
from archerchat.inference.requests import Request
from archerchat.inference.tool_use import ToolUse
from archerchat.model.config import ModelConfig
from archerchat.tokenizer.bpe import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer({bytes([value]): value for value in range(256)})


Say = Callable[..., list[str]]


@pytest.fixture
def say(tokenizer: Tokenizer) -> Say:
    """Feed a hook texts and special tokens; return what it forced after each token, as text."""

    def feed(*pieces: str, evaluate: Callable[[str], str | None]) -> list[str]:
        hook = ToolUse(tokenizer, evaluate)()
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
    hook = ToolUse(tokenizer, lambda _: "<|assistant_end|>")()
    hook(tokenizer.special_id("<|python_start|>"))
    forced = hook(tokenizer.special_id("<|python_end|>"))
    assert list(forced[1:-1]) == list(b"<|assistant_end|>")


def test_each_row_has_a_state_of_its_own(tokenizer: Tokenizer) -> None:
    tool = ToolUse(tokenizer, lambda text: text)
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
    request = Request(
        [tokenizer.bos_id], 12, temperature=0, hook=ToolUse(tokenizer, lambda text: f"[{text}]")
    )
    (completion,) = Engine(model, overlap=overlap).generate([request])[0]
    text = "".join(tokenizer.decode([token]) for token in completion.token_ids)
    turn = "<|python_start|><|python_end|><|output_start|>[]<|output_end|>"
    assert text == turn * 2
    assert completion.mask == [1, 1, 0, 0, 0, 0] * 2
