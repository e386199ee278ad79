"""Arithmetic with whole numbers, done by the calculator.

The smallest case of tool use: copy a problem into the calculator, and its result out of it.
"""

from __future__ import annotations

from random import Random
from typing import Any

from archerchat.errors import UsageError
from archerchat.tasks.base import NumberTask
from archerchat.tasks.conversation import Conversation, assistant, part, user
from archerchat.tasks.generated import GeneratedTask, split_of

QUESTIONS = (
    "What is {problem}?",
    "What's {problem}?",
    "Calculate {problem}.",
    "Compute {problem}.",
    "How much is {problem}?",
    "Please work out {problem}.",
    "{problem} = ?",
    "{problem}",
)
MAX_DRAWS = 10_000


class ArithmeticTask(NumberTask, GeneratedTask):
    """Sums, differences and products of two numbers; the answer ends on `#### result`.

    Args:
        digits: most digits of a number.

    Raises:
        UsageError: as a `GeneratedTask`, or `digits` is out of range.
    """

    name = "Arithmetic"

    def __init__(
        self, split: str = "train", size: int = 1000, seed: int = 0, digits: int = 2
    ) -> None:
        super().__init__(split, size, seed)
        if not 1 <= digits <= 15:
            raise UsageError(f"numbers cannot have {digits} digits here: give 1 to 15")
        self._digits = digits

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"digits": self._digits}

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
        question = random.choice(QUESTIONS).format(problem=shown)
        return {"messages": [user(question), assistant(parts)]}

    def _draw_problem(self, random: Random) -> tuple[int, str, int]:
        """Draw until a problem belongs to this split."""
        for _ in range(MAX_DRAWS):
            left, right = (
                random.randrange(10 ** random.randint(1, self._digits)) for _ in range(2)
            )
            sign = random.choice("+-*")
            if split_of(f"{left}{sign}{right}") == self.split:
                return left, sign, right
        raise AssertionError("one problem in ten belongs to the test, the others to training")
