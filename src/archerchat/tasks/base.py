"""Tasks, which are sequences of conversations, and mixtures of them. Most tasks can judge answers.

A task renders a row when it is asked for, so a mixture of a million rows costs nothing before it
is read. `task[:100]` and `task.shuffled(seed)` are tasks too.

    mixture = TaskMixture([smoltalk, gsm8k, gsm8k])     # GSM8K counts twice
    mixture[0]["messages"]
"""

from __future__ import annotations

import copy
import hashlib
import re
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from decimal import Decimal
from itertools import accumulate
from random import Random
from typing import Any, Literal, Protocol, Self, overload

from archerchat.errors import DataError, UsageError
from archerchat.tasks.conversation import Conversation, text_of

Kind = Literal["categorical", "generative"]


class Rows(Protocol):
    """Rows by their index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class Task(Sequence[Conversation]):
    """A sequence of conversations whose last message is the assistant's right answer.

    Attributes:
        rows: the data that the conversations are rendered from.
        name: the task's name in commands and reports.
        kind: `categorical` if the answer is one of the conversation's `letters`, and the model's
            is the one with the highest logit; `generative` if the model writes the answer.
        split: the part of the data that it holds; None if there is only one.
        random_baseline: the share of right answers that guessing gives (SPEC section 9).
        is_lenient: whether there is a lenient rule beside the reference's.
        left_out: sentences about parts of its files that were not read.
        found: sentences about the content of its files.
        picked: which rows are its conversations, in its order; None for all of them.
    """

    rows: Rows
    name: str
    split: str | None = None
    kind: Kind = "generative"
    random_baseline: float = 0.0
    is_lenient: bool = False
    left_out: Sequence[str] = ()
    found: Sequence[str] = ()
    picked: Sequence[int] | None = None

    def render(self, row: Any) -> Conversation:
        """Return the conversation of a row; by default a row is one."""
        conversation: Conversation = row
        return conversation

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return whether `completion`, a text or a letter, is right by the reference's rule.

        Raises:
            UsageError: this task is for training only.
        """
        raise UsageError(f"{self.name} has no answers to check: it is for training only")

    def evaluate_leniently(self, conversation: Conversation, completion: str) -> bool:
        """Return whether a completion that `evaluate` refuses is right except for its form."""
        return False

    def reward(self, conversation: Conversation, completion: str) -> float:
        """Return the reward of `completion` in reinforcement learning: 1 if right, else 0."""
        return float(self.evaluate(conversation, completion))

    def describe(self) -> dict[str, Any]:
        """Return a JSON value that identifies this task: part of a run's identity."""
        description = {"task": self.name, "split": self.split, "examples": len(self)}
        if self.picked is None:
            return description
        indices = array("Q", self.picked).tobytes()
        return description | {"picked": hashlib.sha256(indices).hexdigest()[:16]}

    def shuffled(self, seed: int) -> Self:
        """Return this task in another order, the same for the same `seed`."""
        order = array("Q", self._order())
        Random(seed).shuffle(order)
        return self._pick(order)

    def __len__(self) -> int:
        return len(self._order())

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Conversation | Self:
        order = self._order()
        if isinstance(index, slice):
            return self._pick(order[index])
        return self.render(self.rows[order[index]])

    def _order(self) -> Sequence[int]:
        return range(len(self.rows)) if self.picked is None else self.picked

    def _pick(self, indices: Sequence[int]) -> Self:
        task = copy.copy(self)
        task.picked = indices
        return task


class CategoricalTask(Task):
    """A task of multiple-choice questions; each conversation has its `letters`."""

    kind: Kind = "categorical"
    random_baseline = 0.25

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return bool(completion == conversation["messages"][-1]["content"])


class NumberTask(Task):
    """A task whose answers end on `#### 42`, as GSM8K writes them (SPEC section 9).

    The strict rule compares the characters after `####`. The lenient one compares numbers, so
    29.00, $29 and **29** are 29 and "- 3" is -3; without `####` it takes the text's last number.
    """

    is_lenient = True

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        number = find_number(text_of(conversation["messages"][-1]["content"]))
        return number is not None and number == find_number(completion)

    def evaluate_leniently(self, conversation: Conversation, completion: str) -> bool:
        number = find_number_leniently(text_of(conversation["messages"][-1]["content"]))
        return number is not None and number == find_number_leniently(completion)


_NUMBER = re.compile(r"#### *(-?\.?[0-9][0-9.,]*)")
# A minus after a digit or a parenthesis subtracts; anywhere else it is the number's sign.
_LENIENT = re.compile(r"(?:(?<![\d)])(?<![\d)] )([-−])[ *$€£]*)?(\.?\d[\d,]*(?:\.\d+)?)")


def find_number(text: str) -> str | None:
    """Return the number after the first `####` that has one, commas removed; None without one."""
    match = _NUMBER.search(text)
    return match[1].replace(",", "").rstrip(".") if match else None


def find_number_leniently(text: str) -> Decimal | None:
    """Return the first number after the first `####`, else the text's last number, else None."""
    _, _, after = text.partition("####")
    found = _LENIENT.findall(after)[:1] or _LENIENT.findall(text)[-1:]
    if not found:
        return None
    sign, digits = found[0]
    value = Decimal(digits.replace(",", ""))
    return -value if sign else value


class TaskMixture:
    """Tasks shuffled together; listing one several times oversamples it.

    The order depends on the tasks' lengths and `seed` alone. Empty tasks are a DataError.
    """

    def __init__(self, tasks: Sequence[Task], seed: int = 42) -> None:
        assert tasks, "a mixture needs at least one task"
        self.tasks, self._seed = tuple(tasks), seed
        self._ends = list(accumulate(map(len, tasks)))
        if not self._ends[-1]:
            names = ", ".join(task.name for task in tasks)
            raise DataError(f"no conversations in {names}: nothing to learn from")
        self._shuffled = array("Q", range(len(self)))
        Random(seed).shuffle(self._shuffled)

    def __len__(self) -> int:
        return self._ends[-1]

    def origin(self, index: int) -> tuple[int, int]:
        """Return the index in `tasks` of a conversation's task, and its index in that task."""
        place = self._shuffled[index]
        task = bisect_right(self._ends, place)
        return task, place - (self._ends[task - 1] if task else 0)

    def describe(self) -> dict[str, Any]:
        """Return a JSON value that identifies this mixture, with each task under its number."""
        tasks = {str(i): task.describe() for i, task in enumerate(self.tasks)}
        return {"tasks": tasks, "seed": self._seed}

    def __getitem__(self, index: int) -> Conversation:
        task, inner = self.origin(index)
        return self.tasks[task][inner]
