"""GSM8K: word problems of the primary school, solved with the calculator.

The data set marks what its authors computed, `2 * 3 = <<2*3=6>>6`. Each mark becomes two parts of
the answer: the Python that the assistant writes, and the output that the engine supplies.
"""

from __future__ import annotations

import re

from archerchat.tasks.base import NumberTask
from archerchat.tasks.conversation import Conversation, assistant, part, user
from archerchat.tasks.hub import Row, TableTask

_MARK = re.compile(r"<<([^<>]*)>>")


def parse_answer(answer: str) -> list[dict[str, str]]:
    """Return the parts of an answer with `<<expression=result>>` marks."""
    parts = []
    for number, piece in enumerate(_MARK.split(answer)):
        expression, _, result = piece.rpartition("=")
        if number % 2 and expression:
            parts += [part("python", expression), part("python_output", result)]
        elif piece:  # text, or a mark without a result, which has nothing to run
            parts.append(part("text", piece))
    return parts


class GSM8KTask(NumberTask, TableTask):
    """Word problems whose answers end on `#### number`."""

    name = "GSM8K"

    def render(self, row: Row) -> Conversation:
        return {"messages": [user(row["question"]), assistant(parse_answer(row["answer"]))]}
