"""Tasks by the names that commands and reports use.

task = build_task("ARC-Easy", "test", files)[:200]
"""

from __future__ import annotations

from collections.abc import Callable

from archerchat.errors import UsageError
from archerchat.tasks.arithmetic import ArithmeticTask
from archerchat.tasks.base import Task
from archerchat.tasks.gsm8k import GSM8KTask
from archerchat.tasks.hub import TaskFiles
from archerchat.tasks.humaneval import HumanEvalTask
from archerchat.tasks.jsonl import SmolTalkTask
from archerchat.tasks.multiple_choice import ARCTask, MMLUTask
from archerchat.tasks.spelling import SimpleSpellingTask, SpellingBeeTask

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
