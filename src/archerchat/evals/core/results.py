"""What an evaluation found: figures by task, CORE, and the files they are kept in.

`core_<step>.json` and `.csv` are the results; `core_<step>.partial.json` holds the tasks that are
done while an evaluation runs. It names what it belongs to (`key`): with another model, bundle or
option it is not gone on with.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from archerchat.evals.core.bundle import Task
from archerchat.evals.offline_tasks import PREFIX as OFFLINE
from archerchat.files import write_bytes, write_json

NEAR_TIE = 1e-5
"""Mean losses, or logits, that differ by less may change places with any change of arithmetic."""
FULL_TASKS = 22
MOST_NAMED = 4
"""Tasks that a note lists."""
CONFIDENCE = 1.96
"""Standard errors to each side of a 95 % interval."""


@dataclass(frozen=True)
class TaskResult:
    """One task's figures."""

    label: str
    task_type: str
    num_fewshot: int
    examples: int
    """Evaluated, over all ranks."""
    correct: int
    random_baseline: float
    seconds: float
    """Prompts and tokenization included."""
    prompt_tokens: int
    """In all prompts."""
    tokens_run: int
    """Of them, those that had to be run."""
    near_ties: tuple[int, ...] = ()
    """Examples whose outcome is within `NEAR_TIE` of another."""
    cropped: int = 0
    """Examples that lost tokens on the left to `--max-length`."""
    beyond_sequence: int = 0
    """Examples with a prompt longer than the model's sequence length, which its windows bound."""
    unscored: int = 0
    """Examples with an option that has nothing to score, which cannot win."""

    @property
    def accuracy(self) -> float:
        return self.correct / self.examples

    @property
    def centred(self) -> float:
        """The accuracy on a scale where guessing is 0 and perfection 1."""
        return (self.accuracy - self.random_baseline) / (1 - self.random_baseline)

    @property
    def examples_per_second(self) -> float:
        return self.examples / self.seconds

    @property
    def variance(self) -> float:
        """Of the centred accuracy, over draws of examples; two successes and failures are added
        (Agresti and Coull), so that an accuracy of 0 has one too."""
        share = (self.correct + 2) / (self.examples + 4)
        return share * (1 - share) / (self.examples + 4) / (1 - self.random_baseline) ** 2

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "near_ties": list(self.near_ties),
            "accuracy": self.accuracy,
            "centred": self.centred,
            "examples_per_second": self.examples_per_second,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TaskResult:
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError: it is something else.
        """
        given = {field.name: value[field.name] for field in fields(cls)}
        return cls(**given | {"near_ties": tuple(value["near_ties"])})


@dataclass(frozen=True)
class CoreResult:
    """All tasks of an evaluation."""

    tasks: tuple[TaskResult, ...]

    @property
    def core(self) -> float:
        """The mean centred accuracy."""
        return sum(task.centred for task in self.tasks) / len(self.tasks)

    @property
    def half_width(self) -> float:
        """Half of CORE's 95 % interval: what drawing other examples of these tasks may change."""
        return CONFIDENCE * math.sqrt(sum(task.variance for task in self.tasks)) / len(self.tasks)

    @property
    def seconds(self) -> float:
        return sum(task.seconds for task in self.tasks)

    def to_json(self) -> dict[str, Any]:
        return {
            "core": self.core,
            "interval": [self.core - self.half_width, self.core + self.half_width],
            "num_tasks": len(self.tasks),
            "seconds": self.seconds,
            "tasks": [task.to_json() for task in self.tasks],
        }

    def to_csv(self) -> str:
        """Return a table with a line a task, and CORE in the last."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = ("task_type", "num_fewshot", "examples", "random_baseline", "accuracy", "centred")
        more = ("examples_per_second", "seconds")
        writer.writerow(["task", *names, *more, "near_ties", "cropped"])
        for task in self.tasks:
            figures = [getattr(task, name) for name in (*names, *more)]
            writer.writerow([task.label, *figures, len(task.near_ties), task.cropped])
        writer.writerow(["CORE", *[""] * 5, self.core, "", self.seconds, "", ""])
        return text.getvalue()


def write_results(stem: Path, result: CoreResult, about: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write `<stem>.json` and `<stem>.csv`, each of them whole or not at all; return both.

    Args:
        about: what was evaluated and how; goes into the JSON.
    """
    paths = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".csv")
    write_json(paths[0], {**about, **result.to_json()})
    write_bytes(paths[1], result.to_csv().encode())
    return paths


class PartialResults:
    """The finished tasks of an evaluation that is not.

    Args:
        path: the file; None keeps nothing.
        key: everything that the figures depend on.
    """

    def __init__(self, path: Path | None, key: Mapping[str, Any]) -> None:
        self._path, self._key = path, json.loads(json.dumps(key))
        self.tasks: dict[str, TaskResult] = {}
        """By label."""
        if path is not None:
            self._load(path)

    def _load(self, path: Path) -> None:
        """Take over the tasks of an evaluation with the same key; ignore anything else."""
        try:
            content = json.loads(path.read_bytes())
            if content["key"] == self._key:
                found = [TaskResult.from_json(value) for value in content["tasks"]]
                self.tasks = {task.label: task for task in found}
        except (OSError, ValueError, KeyError, TypeError):
            return

    def add(self, result: TaskResult) -> None:
        """Keep one more task."""
        self.tasks[result.label] = result
        if self._path is not None:
            tasks = [task.to_json() for task in self.tasks.values()]
            write_json(self._path, {"key": self._key, "tasks": tasks})

    def remove(self) -> None:
        """Delete the file: the results are complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def is_offline(tasks: Sequence[Task | TaskResult]) -> bool:
    """Say whether these are the tasks that are generated here, which are not CORE."""
    return all(task.label.startswith(OFFLINE) for task in tasks)


def describe(result: CoreResult) -> list[str]:
    """Return what a reader of the figures should know beside them."""
    notes = []
    if is_offline(result.tasks):
        notes.append(
            "these tasks are generated here and are not CORE: their score can be compared with "
            "nothing but itself"
        )
    elif len(result.tasks) != FULL_TASKS:
        notes.append(
            f"the mean of {len(result.tasks)} tasks is not the published CORE, which has "
            f"{FULL_TASKS}"
        )
    for what, names in (
        ("examples were cropped on the left", "cropped"),
        ("examples have a prompt beyond the model's sequence length", "beyond_sequence"),
        ("examples have an option with nothing to score, which cannot win", "unscored"),
    ):
        counts: Sequence[tuple[str, int]] = [(t.label, getattr(t, names)) for t in result.tasks]
        if total := sum(count for _, count in counts):
            affected = [f"{label} {count}" for label, count in counts if count]
            many = f"in {len(affected)} tasks"
            where = many if len(affected) > MOST_NAMED else ", ".join(affected)
            notes.append(f"{total} {what}: {where}")
    ties = [(task.label, task.near_ties) for task in result.tasks if task.near_ties]
    if ties:
        where = "; ".join(f"{label} {', '.join(map(str, which))}" for label, which in ties)
        notes.append(f"near-ties (closer than {NEAR_TIE:g}), by example: {where}")
    return notes
