"""Read what evaluations left under `evals/<stage>/<tag>`: CORE, the offline tasks, ChatCORE.

A file's name begins with its kind: `core_000960.json`, `offline_000960_max8.json`,
`chat_step_000420.json`, `chat_step_000420_Arithmetic-10.json`. While an evaluation runs,
`core_000960.partial.json` has the tasks that are done, and CORE's has under `key` what they belong
to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from archerchat.evals.chat import ANSWER_TOKENS
from archerchat.evals.core.results import FULL_TASKS
from archerchat.evals.statistics import centred, wilson_interval
from archerchat.home import Home

Kind = Literal["core", "chat", "offline"]
SCORES: dict[Kind, str] = {"core": "CORE", "chat": "ChatCORE", "offline": "offline tasks"}
"""What an evaluation's score is called. Offline tasks are generated, and are not CORE."""


@dataclass(frozen=True)
class TaskScore:
    """One task's outcome."""

    label: str
    accuracy: float
    baseline: float
    """Accuracy of guessing."""
    examples: int
    interval: tuple[float, float]
    """95 % confidence interval of the accuracy."""
    seconds: float

    @property
    def centred(self) -> float:
        """Accuracy on a scale where guessing is 0 and perfection 1."""
        return centred(self.accuracy, self.baseline)


@dataclass(frozen=True)
class Result:
    """One evaluation of one checkpoint."""

    kind: Kind
    stage: str
    tag: str
    step: int
    score: float | None
    """CORE, ChatCORE or the offline tasks' mean centred accuracy; None if tasks are missing."""
    tasks: tuple[TaskScore, ...]
    complete: bool
    conditions: tuple[str, ...]
    """How it differs from the published evaluation, such as "at most 8 per task"."""

    @property
    def _fullness(self) -> tuple[bool, int, int, int]:
        examples = sum(task.examples for task in self.tasks)
        return self.score is not None, self.step, examples, -len(self.conditions)


def load_results(home: Home, stage: str, tag: str) -> list[Result]:
    """Return the evaluations of a model at a stage: by step, the fullest of a step last.

    Those without a score, since tasks are missing, come first. Files that are damaged, or no
    evaluation, are skipped.
    """
    results = []
    for kind in SCORES:
        for path in (home.root / "evals" / stage / tag).glob(f"{kind}_*.json"):
            try:
                results.append(_read_result(path, kind, stage, tag))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
                continue
    return sorted(results, key=lambda result: result._fullness)


def _read_result(path: Path, kind: Kind, stage: str, tag: str) -> Result:
    content = json.loads(path.read_bytes())
    about, tasks = content.get("key", content), content["tasks"]
    by_label = tasks if isinstance(tasks, dict) else {task["label"]: task for task in tasks}
    complete = about is content and content.get("complete", True)
    return Result(
        kind,
        stage,
        tag,
        int(about["step"]),
        content.get("chatcore" if kind == "chat" else "core") if complete else None,
        tuple(_read_task(label, task) for label, task in by_label.items()),
        complete,
        tuple(_read_conditions(content, about, kind)),
    )


def _read_conditions(
    content: Mapping[str, Any], about: Mapping[str, Any], kind: Kind
) -> Iterator[str]:
    options, sampling = about.get("options", {}), about.get("sampling", {})
    limits = [limit for limit in about.get("limits", {}).values() if limit is not None]
    if cap := options.get("max_per_task") or max(limits, default=None):
        yield f"at most {cap:,} per task"
    if length := options.get("max_length"):
        yield f"prompts of at most {length:,} tokens"
    if kind == "core" and (tasks := content.get("num_tasks", FULL_TASKS)) != FULL_TASKS:
        yield f"{tasks} of {FULL_TASKS} tasks"
    if temperature := sampling.get("temperature"):
        yield f"{sampling['num_samples']} sample(s) at temperature {temperature:g}"
    if (tokens := sampling.get("max_new_tokens", ANSWER_TOKENS)) < ANSWER_TOKENS:
        yield f"answers of at most {tokens:,} tokens"


def _read_task(label: str, task: Mapping[str, Any]) -> TaskScore:
    examples = task["problems"] if "problems" in task else task["examples"]
    low, high = task.get("interval_95") or wilson_interval(task["correct"], examples)
    baseline, seconds = task["random_baseline"], task["seconds"]
    return TaskScore(label, task["accuracy"], baseline, examples, (low, high), seconds)


def latest(results: Sequence[Result], kind: Kind, *stages: str) -> Result | None:
    """Return the last evaluation of a kind, a complete one if any is; of any stage by default."""
    chosen = [r for r in results if r.kind == kind and (not stages or r.stage in stages)]
    return next(reversed([result for result in chosen if result.complete] or chosen), None)
