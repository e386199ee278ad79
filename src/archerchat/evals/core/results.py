"""CORE's results: figures per task, their mean, and the files that keep them.

`core_<step>.json` has the results. While an evaluation runs, `core_<step>.partial.json` holds the
finished tasks and their `key`: the model, the bundle and the options that they belong to. An
evaluation with another key starts over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from archerchat.config import from_json
from archerchat.evals.core.bundle import CoreTask
from archerchat.evals.statistics import Interval, TaskResult, mean_score
from archerchat.files import write_json

NEAR_TIE = 1e-5
"""Mean losses, or logits, that differ by less may swap with any change of arithmetic."""
FULL_TASKS = 22
MOST_NAMED = 4
"""Most tasks that a note names one by one."""


@dataclass(frozen=True, kw_only=True)
class CoreTaskResult(TaskResult):
    """One task of CORE."""

    num_fewshot: int
    prompt_tokens: int
    """Tokens in all prompts."""
    tokens_run: int
    """Prompt tokens that had to be run; the rest were shared or out of every window's reach."""
    near_ties: tuple[int, ...] = ()
    """Examples whose outcome is within `NEAR_TIE` of another."""
    cropped: int = 0
    """Examples that lost tokens on the left to `--max-length`."""
    beyond_sequence: int = 0
    """Examples with a prompt longer than the model's sequence length, which its windows bound."""
    unscored: int = 0
    """Examples with an option that has nothing to score."""

    @property
    def examples_per_second(self) -> float:
        return self.examples / self.seconds

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "accuracy": self.accuracy,
            "centred": self.centred,
            "examples_per_second": self.examples_per_second,
        }


@dataclass(frozen=True)
class CoreResult:
    """All tasks of an evaluation."""

    tasks: tuple[CoreTaskResult, ...]

    @property
    def core(self) -> float:
        """The mean centred accuracy."""
        return mean_score(self.tasks)[0]

    @property
    def interval(self) -> Interval:
        """CORE's 95 % interval: what drawing other examples of these tasks may change."""
        return mean_score(self.tasks)[1]

    @property
    def seconds(self) -> float:
        return sum(task.seconds for task in self.tasks)

    def to_json(self) -> dict[str, Any]:
        return {
            "core": self.core,
            "interval": list(self.interval),
            "num_tasks": len(self.tasks),
            "seconds": self.seconds,
            "tasks": [task.to_json() for task in self.tasks],
        }


class PartialResults:
    """The finished tasks of a running evaluation, kept in a file if a `path` is given.

    Args:
        key: JSON of everything that the figures depend on.
    """

    def __init__(self, path: Path | None, key: Mapping[str, Any]) -> None:
        self._path, self._key = path, json.loads(json.dumps(key))
        self.tasks: dict[str, CoreTaskResult] = {}  # by label
        # A missing, broken or foreign file is replaced.
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(path.read_bytes() if path else b"{}")
            if content["key"] == self._key:
                found = [from_json(CoreTaskResult, value) for value in content["tasks"]]
                self.tasks = {task.label: task for task in found}

    def add(self, result: CoreTaskResult) -> None:
        """Keep one more task."""
        self.tasks[result.label] = result
        if self._path is not None:
            tasks = [task.to_json() for task in self.tasks.values()]
            write_json(self._path, {"key": self._key, "tasks": tasks})

    def remove(self) -> None:
        """Delete the file: the results are complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def is_offline(tasks: Sequence[CoreTask | CoreTaskResult]) -> bool:
    """Whether these are the package's own tasks, which are not CORE."""
    return all(task.label.startswith("offline_") for task in tasks)


def describe(result: CoreResult) -> list[str]:
    """Return notes that belong beside the figures."""
    notes, count = [], len(result.tasks)
    if is_offline(result.tasks):
        notes.append(
            "these tasks are not CORE: their score can be compared with nothing but itself"
        )
    elif count != FULL_TASKS:
        notes.append(f"the mean of {count} tasks is not the published CORE, which has {FULL_TASKS}")
    for what, name in (
        ("were cropped on the left", "cropped"),
        ("have a prompt beyond the model's sequence length", "beyond_sequence"),
        ("have an option with nothing to score, which wins only if it stands first", "unscored"),
    ):
        counts = {t.label: getattr(t, name) for t in result.tasks if getattr(t, name)}
        if counts:
            named = ", ".join(f"{label} {count}" for label, count in counts.items())
            where = f"in {len(counts)} tasks" if len(counts) > MOST_NAMED else named
            notes.append(f"{sum(counts.values())} examples {what}: {where}")
    ties = {t.label: ", ".join(map(str, t.near_ties)) for t in result.tasks if t.near_ties}
    if ties:
        named = "; ".join(f"{label} {examples}" for label, examples in ties.items())
        notes.append(f"near-ties (closer than {NEAR_TIE:g}), by example: {named}")
    return notes
