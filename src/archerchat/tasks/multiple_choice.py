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
from archerchat.tasks.hub import Row, TableTask, TaskFiles

ArcName = Literal["ARC-Easy", "ARC-Challenge"]


def build_question(
    question: str, letters: Sequence[str], choices: Sequence[str], answer: str, **more: Any
) -> Conversation:
    """Return a question whose right answer is the letter `answer`; each letter follows its choice.

    Raises:
        DataError: `answer` is none of the letters, or these are not as many as the choices.
    """
    if len(letters) != len(choices):
        raise DataError(f"{len(letters)} letters for {len(choices)} choices of {question[:60]!r}")
    if answer not in letters:
        raise DataError(
            f"the answer {answer!r} is none of {', '.join(letters)} in the question "
            f"{question[:60]!r}: fix or remove it"
        )
    lines = [f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True)]
    text = (
        f"Multiple Choice question: {question}\n{''.join(lines)}"
        "\nRespond only with the letter of the correct answer."
    )
    return {"messages": [user(text), assistant(answer)], "letters": tuple(letters), **more}


class MMLUTask(CategoricalTask, TableTask):
    """Questions from 57 subjects; `auxiliary_train` is for training, `test` for the score."""

    name = "MMLU"

    def render(self, row: Row) -> Conversation:
        letters = string.ascii_uppercase[: len(row["choices"])]
        answer = dict(enumerate(letters)).get(row["answer"], str(row["answer"]))
        return build_question(
            row["question"], letters, row["choices"], answer, subject=row["subject"]
        )


class ARCTask(CategoricalTask, TableTask):
    """Science questions for school: `ARC-Easy` or `ARC-Challenge`."""

    def __init__(self, files: TaskFiles, name: ArcName, split: str = "test") -> None:
        self.name = name
        super().__init__(files, split)

    def render(self, row: Row) -> Conversation:
        choices = row["choices"]
        return build_question(row["question"], choices["label"], choices["text"], row["answerKey"])
