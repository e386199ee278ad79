"""Tasks with collected conversations: exams, GSM8K, SmolTalk, and your own JSON lines.

The answer to an exam's question is a letter alone (SPEC section 6): for MMLU one of A to D, for ARC
the data's own, mostly A to D, sometimes 1 to 4. GSM8K marks what its authors computed,
`2 * 3 = <<2*3=6>>6`: each mark becomes two parts of the answer, the Python that the assistant
writes and the output that the engine supplies.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from archerchat.errors import DataError
from archerchat.files import sha256_file
from archerchat.tasks.base import CategoricalTask, NumberTask, Task
from archerchat.tasks.conversation import (
    Conversation,
    assistant,
    check_conversation,
    find_layout,
    part,
    user,
)
from archerchat.tasks.hub import Row, TableTask, TaskFiles
from archerchat.text_files import JSON_KINDS, Refuse, iter_rows, list_folder, refuse

MAX_NAMED = 10
"""Maximum number of bad lines to list in full."""
_MARK = re.compile(r"<<([^<>]*)>>")


def build_question(
    question: str, letters: Sequence[str], choices: Sequence[str], answer: str, **more: Any
) -> Conversation:
    """Return a multiple-choice question; a DataError if its letters and answer do not fit it."""
    if len(letters) != len(choices):
        raise DataError(f"{len(letters)} letters for {len(choices)} choices of {question[:60]!r}")
    if answer not in letters:
        raise DataError(
            f"the answer {answer!r} is not one of {', '.join(letters)} in the question "
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

    def __init__(self, files: TaskFiles, name: str, split: str = "test") -> None:
        self.name = name
        super().__init__(files, split)

    def render(self, row: Row) -> Conversation:
        choices = row["choices"]
        return build_question(row["question"], choices["label"], choices["text"], row["answerKey"])


class SmolTalkTask(TableTask):
    """General conversations of `smol-smoltalk`: 460 thousand, for training only."""

    name = "SmolTalk"


class GSM8KTask(NumberTask, TableTask):
    """Word problems for primary school, whose answers end on `#### number`."""

    name = "GSM8K"

    def render(self, row: Row) -> Conversation:
        return {"messages": [user(row["question"]), assistant(parse_answer(row["answer"]))]}


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


class JsonlTask(Task):
    """The conversations of a file, or of the JSON files below a folder in the order of their names.

    Each line, or each value of a JSON list, has one of the layouts of `tasks.conversation`.
    All are checked when the file is read, so a broken one is found before training begins.

    Args:
        split: which files to read of a folder that has a train split; None reads all of them.
        skip_bad: leave out malformed lines, and list the first of them in `left_out`.

    Raises:
        DataError: there are no conversations, or one is malformed; the message names the line.
    """

    def __init__(
        self,
        path: Path,
        split: Literal["train", "validation"] | None = None,
        skip_bad: bool = False,
    ) -> None:
        folder = list_folder(path, JSON_KINDS)
        splits = {"train": folder.train, "validation": folder.held_out}
        paths = splits[split] if split else sorted([*folder.train, *folder.held_out])
        self.name, self.split = path.name, split if folder.held_out else None
        self.rows, bad, layouts = [], list[str](), Counter[str]()
        report: Refuse = bad.append if skip_bad else refuse
        for where, value in (row for each in paths for row in iter_rows(each, report)):
            try:
                self.rows.append(check_conversation(value))
                layouts[find_layout(value)] += 1
            except DataError as error:
                report(f"{where}: {error}")
        listed = [f"{len(bad):,} bad lines were left out, the first:", *bad[:MAX_NAMED]]
        self.left_out = [*folder.left_out, *(listed if bad else [])]
        if not self.rows:
            raise DataError(
                f"{path} holds no conversation: give a file with one JSON line for each"
            )
        counts = ", ".join(f"{number:,} in {name} layout" for name, number in layouts.items())
        self.found = [f"{path}: {counts}"]
        self._digests = [sha256_file(each) for each in paths]

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"sha256": self._digests}
