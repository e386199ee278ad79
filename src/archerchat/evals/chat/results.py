"""What a chat evaluation found: counts, shares with their intervals, ChatCORE, and its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from archerchat.evals.statistics import (
    Interval,
    centred,
    mean_interval,
    pass_at_k,
    pass_sizes,
    wilson_interval,
)
from archerchat.tasks.base import Kind
from archerchat.tasks.registry import CHATCORE


@dataclass(frozen=True)
class TaskResult:
    """One task's outcome, over all ranks."""

    name: str
    kind: Kind
    baseline: float
    """The accuracy of guessing."""
    right: tuple[int, ...]
    """Right samples of each problem, by the reference's rule."""
    num_samples: int
    """Samples per problem."""
    lenient: int | None = None
    """Right samples of all problems by the task's lenient rule; None for a task without one."""
    cut_prompts: int = 0
    """Prompts that the context had no room for."""
    cut_answers: int = 0
    """Answers that ended by the limit of tokens or at the context's end."""
    answer_tokens: int = 0
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        """The share of right answers: pass@1. It can be compared with the reference's."""
        return sum(self.right) / (len(self.right) * self.num_samples)

    @property
    def lenient_accuracy(self) -> float | None:
        """The share of answers that are right by the lenient rule; None without one."""
        total = len(self.right) * self.num_samples
        return None if self.lenient is None else self.lenient / total

    @property
    def interval(self) -> Interval:
        """95 % confidence of the accuracy, problems counting as trials."""
        return wilson_interval(sum(self.right) / self.num_samples, len(self.right))

    @property
    def centred(self) -> float:
        """The accuracy where guessing is 0 and perfection 1."""
        return centred(self.accuracy, self.baseline)

    @property
    def pass_at(self) -> dict[int, float]:
        """pass@k by k, up to the number of samples."""
        sizes = pass_sizes(self.num_samples)
        return {k: pass_at_k(self.right, self.num_samples, k) for k in sizes}

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        figures: dict[str, Any] = {
            "kind": self.kind,
            "problems": len(self.right),
            "accuracy": self.accuracy,
            "interval_95": list(self.interval),
            "lenient_accuracy": self.lenient_accuracy,
            "random_baseline": self.baseline,
            "centred": self.centred,
            "cut_prompts": self.cut_prompts,
            "seconds": round(self.seconds, 3),
        }
        if self.kind == "generative":
            figures |= {
                "num_samples": self.num_samples,
                "pass_at": {str(k): value for k, value in self.pass_at.items()},
                "cut_answers": self.cut_answers,
                "answer_tokens": self.answer_tokens,
            }
        return figures


def chatcore(results: Sequence[TaskResult]) -> tuple[float, Interval] | None:
    """Return ChatCORE and its 95 % interval, or None unless all of its tasks are there."""
    found: Mapping[str, TaskResult] = {result.name: result for result in results}
    if any(name not in found for name in CHATCORE):
        return None
    tasks = [found[name] for name in CHATCORE]
    scores = [task.centred for task in tasks]
    intervals = [
        (centred(task.interval[0], task.baseline), centred(task.interval[1], task.baseline))
        for task in tasks
    ]
    return sum(scores) / len(scores), mean_interval(scores, intervals)
