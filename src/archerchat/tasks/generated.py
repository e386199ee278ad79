"""Tasks that are computed instead of collected: any number of examples, no download.

Example `index` of a split depends only on the split and the index, on every machine.
Words and problems are assigned to a split by their hash, so no test question is also a training
question. Arithmetic is the smallest case of tool use: copy a problem into the calculator, and its
result out of it. Spelling is hard for a model, since it sees tokens and not letters: SpellingBee
counts a letter by hand and then checks the count with the calculator; SimpleSpelling only spells.

`questions.toml` holds the wordings of the questions. `words.txt` holds the words to spell: those of
3 to 15 lower-case letters with a vowel that occur in at least three documents of the prose in
Python's standard library. It is a file so that every machine and every Python version asks the
same questions.
"""

from __future__ import annotations

import hashlib
import string
import tomllib
from abc import abstractmethod
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from archerchat.errors import UsageError
from archerchat.tasks.base import NumberTask, Task
from archerchat.tasks.conversation import Conversation, assistant, part, user

SEED = 0
MAX_DIGITS = 2
"""Maximum digits of a number in a problem."""
TEST_SHARE = 10
"""One word or problem in ten belongs to the test."""
QUOTES = ("", "", "'", '"')
"""Quotation marks around a word or a letter; most people use none."""


class GeneratedTask(Task):
    """A task whose examples each have their own random generator; splits are train and test."""

    def __init__(self, split: str = "train", size: int = 1000) -> None:
        check_split(split)
        assert size > 0, size
        self.split: str = split
        self.rows = range(size)

    def render(self, row: int) -> Conversation:
        return self.draw(Random(f"{self.name} {SEED} {self.split} {row}"))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"seed": SEED}

    @abstractmethod
    def draw(self, random: Random) -> Conversation:
        """Return a conversation that depends only on `random` and the split."""


class ArithmeticTask(NumberTask, GeneratedTask):
    """Sums, differences and products of two whole numbers; the answer ends on `#### result`."""

    name = "Arithmetic"

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"digits": MAX_DIGITS}

    def draw(self, random: Random) -> Conversation:
        left, sign, right = self._draw_problem(random)
        result = str({"+": left + right, "-": left - right, "*": left * right}[sign])
        shown = f"{left} {sign} {right}"
        parts = [
            part("text", f"{shown} = "),
            part("python", f"{left}{sign}{right}"),
            part("python_output", result),
            part("text", f"{result}\n\n#### {result}"),
        ]
        question = random.choice(load_questions("arithmetic")).format(problem=shown)
        return {"messages": [user(question), assistant(parts)]}

    def _draw_problem(self, random: Random) -> tuple[int, str, int]:
        while True:  # until a problem belongs to this split
            left, right = (random.randrange(10 ** random.randint(1, MAX_DIGITS)) for _ in range(2))
            sign = random.choice("+-*")
            if split_of(f"{left}{sign}{right}") == self.split:
                return left, sign, right


class SpellingBeeTask(NumberTask, GeneratedTask):
    """Count a letter in a word: by hand, then with Python; the answer ends on `#### count`."""

    name = "SpellingBee"

    def draw(self, random: Random) -> Conversation:
        word = random.choice(load_words(self.split))
        # Mostly a letter that the word has; for others the answer is always 0.
        letter = random.choice(word if random.random() < 0.9 else string.ascii_lowercase)
        question = random.choice(load_questions("count")).format(
            letter=_quoted(letter, random), word=_quoted(word, random)
        )
        count = word.count(letter)
        check = f"Both ways, '{letter}' is in '{word}' {count} times."
        parts = [
            part("text", _count_by_hand(word, letter) + "\n\nNow with Python: "),
            part("python", f"'{word}'.count('{letter}')"),
            part("python_output", str(count)),
            part("text", f"\n\n{check}\n\n#### {count}"),
        ]
        return {"messages": [user(_as_typed(question, random)), assistant(parts)]}


class SimpleSpellingTask(GeneratedTask):
    """Write a word letter by letter."""

    name = "SimpleSpelling"

    def draw(self, random: Random) -> Conversation:
        word = random.choice(load_words(self.split))
        question = random.choice(load_questions("spell")).format(word=_quoted(word, random))
        answer = assistant(f"{word}: {','.join(word)}")
        return {"messages": [user(_as_typed(question, random)), answer]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        expected: str = conversation["messages"][-1]["content"]
        return completion.strip() == expected


def _count_by_hand(word: str, letter: str) -> str:
    """Write the word, its letters, and the running count beside each match of `letter`."""
    lines, count = [f"I spell {word}: {','.join(word)}", "", f"Looking for '{letter}':"], 0
    for number, each in enumerate(word, start=1):
        count += each == letter
        lines.append(f"{number}. {each}" + (f" yes, {count}" if each == letter else ""))
    return "\n".join([*lines, "", f"By hand I count {count}."])


def _quoted(text: str, random: Random) -> str:
    quote = random.choice(QUOTES)
    return f"{quote}{text}{quote}"


def _as_typed(question: str, random: Random) -> str:
    """Return the question as people type: sometimes without capitals or the question mark."""
    if random.random() < 0.3:
        question = question.lower()
    if random.random() < 0.3:
        question = question.rstrip("?.？ ")
    return question


@cache
def load_questions(kind: str) -> tuple[str, ...]:
    """Return the wordings of one kind of question, with placeholders in braces."""
    text = Path(__file__).with_name("questions.toml").read_text(encoding="utf-8")
    return tuple(tomllib.loads(text)[kind])


@cache
def load_words(split: str) -> tuple[str, ...]:
    """Return the words of `train` or `test`, in alphabetical order."""
    text = Path(__file__).with_name("words.txt").read_text(encoding="ascii")
    return tuple(word for word in text.split() if split_of(word) == split)


def check_split(split: str) -> None:
    """Raise UsageError unless generated tasks have this split."""
    if split not in ("train", "test"):
        raise UsageError(f"there is no split {split!r} of a generated task: use train or test")


def split_of(text: str) -> str:
    """Return the split that a word or a problem belongs to."""
    digest = hashlib.sha256(text.encode()).digest()
    return "test" if int.from_bytes(digest[:8]) % TEST_SHARE == 0 else "train"
