"""Tasks that are computed instead of collected: any number of examples, no download.

Example `index` of a split follows from the seed, the split and the index alone, on every machine.
Words and problems are assigned to a split by their hash, so no test question is also a training
question.

`words.txt`, which spelling is about, holds the lower-case words of 3 to 15 letters, one of them a
vowel, that stand free in at least three documents of the prose in Python's standard library. It is
a file so that every machine and every Python asks the same questions.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from functools import cache
from importlib.resources import files
from random import Random
from typing import Any

from archerchat.errors import UsageError
from archerchat.tasks.base import Task
from archerchat.tasks.conversation import Conversation

TEST_SHARE = 10
"""One word or problem in ten belongs to the test."""


class GeneratedTask(Task):
    """A task whose examples are drawn from a random generator of their own.

    Raises:
        UsageError: the split is neither `train` nor `test`, or the size is not positive.
    """

    def __init__(self, split: str = "train", size: int = 1000, seed: int = 0) -> None:
        check_split(split)
        if size < 1:
            raise UsageError(f"{self.name} cannot have {size} examples: give at least 1")
        self.split = split
        self._size, self._seed = size, seed

    def num_examples(self) -> int:
        return self._size

    def example(self, index: int) -> Conversation:
        return self.draw(Random(f"{self.name} {self._seed} {self.split} {index}"))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"seed": self._seed}

    @abstractmethod
    def draw(self, random: Random) -> Conversation:
        """Return a conversation that depends on `random` and the task's settings alone."""


@cache
def load_words(split: str) -> tuple[str, ...]:
    """Return the words of `train` or `test`, in alphabetical order.

    Raises:
        UsageError: there is no such split.
    """
    check_split(split)
    text = files("archerchat.tasks").joinpath("words.txt").read_text(encoding="ascii")
    return tuple(word for word in text.split() if split_of(word) == split)


def check_split(split: str) -> None:
    """Raise UsageError unless generated tasks have this split."""
    if split not in ("train", "test"):
        raise UsageError(f"there is no split {split!r} of a generated task: use train or test")


def split_of(text: str) -> str:
    """Return the split that a word or a problem belongs to."""
    digest = hashlib.sha256(text.encode()).digest()
    return "test" if int.from_bytes(digest[:8]) % TEST_SHARE == 0 else "train"
