"""GSM8K: word problems of the primary school, solved with the calculator.

The data set marks what its authors computed, `2 * 3 = <<2*3=6>>6`. Each mark becomes two parts of
the answer: the Python that the assistant writes, and the output that the engine supplies.
"""

from __future__ import annotations

import re

from archerchat.tasks.answers import same_number
from archerchat.tasks.base import Task
from archerchat.tasks.conversation import Conversation, assistant, part, text_of, user
from archerchat.tasks.hub import GSM8K, TaskFiles

_MARK = re.compile(r"<<([^<>]*)>>")


def parse_answer(answer: str) -> list[dict[str, str]]:
    """Return the parts of an answer with `<<expression=result>>` marks."""
    parts = []
    for number, piece in enumerate(_MARK.split(answer)):
        if number % 2 == 0:
            if piece:
                parts.append(part("text", piece))
            continue
        expression, _, result = piece.rpartition("=")
        if expression:
            parts += [part("python", expression), part("python_output", result)]
        elif piece:  # a mark without a result says nothing to run
            parts.append(part("text", piece))
    return parts


class GSM8KTask(Task):
    """Word problems whose answers end on `#### number`."""

    name = "GSM8K"

    def __init__(self, files: TaskFiles, split: str = "test") -> None:
        self.split = split
        self._rows = files.rows(GSM8K, split)

    def num_examples(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> Conversation:
        row = self._rows[index]
        return {"messages": [user(row["question"]), assistant(parse_answer(row["answer"]))]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return same_number(text_of(conversation["messages"][-1]["content"]), completion)
