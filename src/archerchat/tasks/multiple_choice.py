"""Multiple-choice questions from exams: MMLU, and ARC-Easy and ARC-Challenge (SPEC section 6).

The answer is a letter alone. ARC's letters are those of the data: mostly A to D, sometimes 1 to 4.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any, Literal

from archerchat.errors import DataError
from archerchat.tasks.base import CategoricalTask
from archerchat.tasks.conversation import Conversation, assistant, user
from archerchat.tasks.hub import ARC, MMLU, TaskFiles

ArcName = Literal["ARC-Easy", "ARC-Challenge"]


def render_multiple_choice(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """Write a multiple-choice question as the user's message, each letter after its choice.

    Raises:
        DataError: there are not as many letters as choices.
    """
    if len(letters) != len(choices):
        raise DataError(f"{len(letters)} letters for {len(choices)} choices of {question[:60]!r}")
    lines = [f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True)]
    return (
        f"Multiple Choice question: {question}\n{''.join(lines)}"
        "\nRespond only with the letter of the correct answer."
    )


def build_question(
    question: str, letters: Sequence[str], choices: Sequence[str], answer: str, **more: Any
) -> Conversation:
    """Return the conversation of a question whose right answer is the letter `answer`.

    Raises:
        DataError: `answer` is none of the letters, or these are not as many as the choices.
    """
    text = render_multiple_choice(question, letters, choices)
    if answer not in letters:
        raise DataError(
            f"the answer {answer!r} is none of {', '.join(letters)} in the question "
            f"{question[:60]!r}: mend or remove it"
        )
    messages = [user(text), assistant(answer)]
    return {"messages": messages, "letters": tuple(letters), **more}


class MMLUTask(CategoricalTask):
    """Questions from 57 subjects; `auxiliary_train` is for training, `test` for the score."""

    name = "MMLU"

    def __init__(self, files: TaskFiles, split: str = "test") -> None:
        self.split = split
        self._rows = files.rows(MMLU, split)

    def num_examples(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> Conversation:
        row = self._rows[index]
        choices, answer = row["choices"], row["answer"]
        letters = string.ascii_uppercase[: len(choices)]
        if not isinstance(answer, int) or not 0 <= answer < len(letters):
            raise DataError(
                f"{self.name} {self.split} {index}: the answer {answer!r} is no index of "
                f"{len(letters)} choices"
            )
        return build_question(
            row["question"], letters, choices, letters[answer], subject=row["subject"]
        )


class ARCTask(CategoricalTask):
    """Science questions for school: `ARC-Easy` or `ARC-Challenge`."""

    def __init__(self, files: TaskFiles, name: ArcName, split: str = "test") -> None:
        self.name = name
        self.split = split
        self._rows = files.rows(ARC[name], split)

    def num_examples(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> Conversation:
        row = self._rows[index]
        choices = row["choices"]
        return build_question(row["question"], choices["label"], choices["text"], row["answerKey"])
