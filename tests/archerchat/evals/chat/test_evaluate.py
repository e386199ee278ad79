"""Letters by batched logits: what one prompt at a time through the plain model chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch

from archerchat.errors import DataError
from archerchat.evals.chat import choose_letters, letter_token
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.tasks.conversation import Conversation, assistant, user
from archerchat.tokenizer.chat_format import render_for_completion

LETTERS = ("A", "B", "C", "D", "E")


def question(text: str, letters: tuple[str, ...]) -> Conversation:
    return {"messages": [user(text), assistant(letters[0])], "letters": letters}


@pytest.fixture
def tokenizer(scripted: Callable[[Sequence[str]], Any]) -> Any:
    return scripted(["a"]).tokenizer


def test_batches_choose_what_single_prompts_choose(tokenizer: Any) -> None:
    model = Transformer(ModelConfig(64, tokenizer.vocab_size, 2, 2, 1, 32), backend="matmul")
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.manual_seed(1)))
    random = Random(0)
    questions = [
        question("".join(random.choices("abcdefgh ", k=length)), LETTERS[: random.randint(2, 5)])
        for length in random.choices((1, 17, 18, 40, 90), k=40)
    ]
    expected = []
    for each in questions:
        prompt = render_for_completion(tokenizer, each)
        logits = model(torch.tensor([prompt]))[0, -1].detach()
        expected.append(max(each["letters"], key=lambda letter: float(logits[ord(letter)])))
    steps: list[int] = []
    assert choose_letters(model, tokenizer, questions, steps.append) == expected
    assert len(set(expected)) > 2
    assert 1 < len(steps) < len(questions)
    assert steps[-1] == len(questions)


def test_the_first_of_equal_letters_is_taken(tokenizer: Any) -> None:
    model = Transformer(ModelConfig(64, tokenizer.vocab_size, 1, 2, 1, 32), backend="matmul")
    model.init_weights(0)
    with torch.no_grad():
        model.unembedding.weight.zero_()
    assert choose_letters(model, tokenizer, [question("a", ("C", "B"))]) == ["C"]


def test_a_letter_is_one_token(tokenizer: Any) -> None:
    assert letter_token(tokenizer, "B") == ord("B")
    with pytest.raises(DataError, match="letter 'AB' takes 2 tokens"):
        letter_token(tokenizer, "AB")
