"""Tasks that are computed instead of collected: any number of examples, no download.

Example `index` of a split follows from the seed, the split and the index alone, on every machine.
Nothing that training asks about is asked in the test: words and problems are told apart by a hash.
"""

from __future__ import annotations

from abc import abstractmethod
from random import Random
from typing import Any

from archerchat.errors import UsageError
from archerchat.tasks.base import Task
from archerchat.tasks.conversation import Conversation
from archerchat.tasks.words import check_split


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
        self._size = size
        self._seed = seed

    def num_examples(self) -> int:
        return self._size

    def example(self, index: int) -> Conversation:
        return self.draw(Random(f"{self.name} {self._seed} {self.split} {index}"))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"seed": self._seed}

    @abstractmethod
    def draw(self, random: Random) -> Conversation:
        """Return a conversation that depends on `random` and the task's settings alone."""
