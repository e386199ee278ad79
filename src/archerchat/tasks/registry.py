"""Tasks by the names that commands and reports use.

task = build_task("ARC-Easy", "test", files)[:200]
parse_choices("GSM8K*4,MMLU:500", "--mixture", TASKS)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from archerchat.errors import UsageError
from archerchat.tasks.base import Task
from archerchat.tasks.generated import ArithmeticTask, SimpleSpellingTask, SpellingBeeTask
from archerchat.tasks.gsm8k import GSM8KTask
from archerchat.tasks.hub import TaskFiles
from archerchat.tasks.humaneval import HumanEvalTask
from archerchat.tasks.jsonl import SmolTalkTask
from archerchat.tasks.multiple_choice import ARCTask, MMLUTask

CHATCORE = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
"""The tasks whose mean is ChatCORE (SPEC section 9)."""

TASKS: dict[str, Callable[[TaskFiles, str], Task]] = {
    "ARC-Easy": lambda files, split: ARCTask(files, "ARC-Easy", split),
    "ARC-Challenge": lambda files, split: ARCTask(files, "ARC-Challenge", split),
    "MMLU": lambda files, split: MMLUTask(files, MMLU_TRAIN if split == "train" else split),
    "GSM8K": GSM8KTask,
    "HumanEval": HumanEvalTask,
    "SmolTalk": SmolTalkTask,
    "SpellingBee": lambda files, split: SpellingBeeTask(split, _size(split, 80_000)),
    "SimpleSpelling": lambda files, split: SimpleSpellingTask(split, _size(split, 200_000)),
    "Arithmetic": lambda files, split: ArithmeticTask(split, _size(split, 80_000)),
}
MMLU_TRAIN = "auxiliary_train"
TEST_SIZE = 256
"""How many examples a generated task has for the test."""
_CHOICE = re.compile(r"([\w-]+)(?::(\d+))?(?:\*(\d+))?")


@dataclass(frozen=True)
class TaskChoice:
    """One task of a list on a command line."""

    name: str
    size: int | None
    """Number of its examples to take; None takes all."""
    times: int
    """How often to count each of them."""


def build_task(name: str, split: str, files: TaskFiles) -> Task:
    """Return a split of the task `name`, whose capitals do not matter.

    Raises:
        UsageError: there is no such task or split; the message lists those there are.
        DataError: its files are missing or broken.
    """
    known = {each.lower(): build for each, build in TASKS.items()}
    if name.lower() not in known:
        raise UsageError(f"there is no task {name!r}: choose from {', '.join(TASKS)}")
    return known[name.lower()](files, split)


def _size(split: str, train: int) -> int:
    return train if split == "train" else TEST_SIZE


def parse_choices(text: str, flag: str, names: Iterable[str]) -> list[TaskChoice]:
    """Read a list of tasks such as `GSM8K*4,Arithmetic:20000`, whose capitals do not matter.

    Args:
        flag: where the list comes from, for errors.
        names: the tasks that may be in it.

    Raises:
        UsageError: an entry cannot be read, or there is no such task.
    """
    known = {name.lower(): name for name in names}
    choices = []
    for word in text.replace(" ", "").split(","):
        match = _CHOICE.fullmatch(word)
        size = int(match[2]) if match and match[2] else None
        times = int(match[3]) if match and match[3] else 1
        if match is None or size == 0 or times == 0:
            raise UsageError(
                f"{flag}: {word!r} cannot be read: write a task's name, with :N for N of its "
                "examples and *N to count them N times, such as SpellingBee:5000*2"
            )
        if match[1].lower() not in known:
            raise UsageError(
                f"{flag}: there is no task {match[1]!r}: choose from {', '.join(known.values())}"
            )
        choices.append(TaskChoice(known[match[1].lower()], size, times))
    return choices
