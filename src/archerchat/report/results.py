"""Read the results of evaluations under `evals/<stage>/<tag>`: CORE, offline tasks, ChatCORE.

A file's name begins with its kind: `core_000960.json`, `offline_000960_max8.json`,
`chat_step_000420.json`, `chat_step_000420_Arithmetic-10.json`. While an evaluation runs, its
`.partial.json` has the finished tasks; CORE's describes the evaluation under `key`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from archerchat.evals.chat import ANSWER_TOKENS
from archerchat.evals.core.evaluate import FULL_TASKS
from archerchat.evals.statistics import TaskResult
from archerchat.home import Home

Kind = Literal["core", "chat", "offline"]
SCORES: dict[Kind, str] = {"core": "CORE", "chat": "ChatCORE", "offline": "offline tasks"}
"""Names of the evaluations' scores. Offline tasks are generated, and are not CORE."""


@dataclass(frozen=True)
class Result:
    """One evaluation of one checkpoint."""

    kind: Kind
    stage: str
    tag: str
    step: int
    score: float | None
    """CORE, ChatCORE or the offline tasks' mean centred accuracy; None if tasks are missing."""
    tasks: list[TaskResult]
    complete: bool
    conditions: list[str]
    """Differences from the published evaluation, such as "at most 8 per task"."""

    @property
    def is_whole(self) -> bool:
        """Whether it can be compared with published scores."""
        return self.score is not None and not self.conditions

    @property
    def fullness(self) -> tuple[bool, int, int, int]:
        examples = sum(task.examples for task in self.tasks)
        return self.score is not None, self.step, examples, -len(self.conditions)


def load_results(home: Home, stage: str, tag: str) -> list[Result]:
    """Return the evaluations of a model at a stage, by step; of a step, the fullest is last.

    Those without a score, because tasks are missing, come first. Damaged files are skipped.
    """
    results = []
    for kind in SCORES:
        for path in (home.root / "evals" / stage / tag).glob(f"{kind}_*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                results.append(_read(kind, stage, tag, json.loads(path.read_bytes())))
    return sorted(results, key=lambda result: result.fullness)


def _read(kind: Kind, stage: str, tag: str, content: dict[str, Any]) -> Result:
    """Read a file of `archerchat eval base` or `archerchat eval chat`."""
    about, conditions = content.get("key", content), []
    if kind == "chat":
        complete, options = content["complete"], content["sampling"]
        cap = max(filter(None, content["limits"].values()), default=None)
        tasks = []
        for name, task in content["tasks"].items():
            examples, samples = task["problems"], task.get("num_samples", 1)
            result = TaskResult(
                label=name,
                task_type=task["kind"],
                examples=examples,
                correct=round(task["accuracy"] * examples * samples),
                random_baseline=task["random_baseline"],
                seconds=task["seconds"],
                num_samples=samples,
            )
            tasks.append(result)
        if temperature := options["temperature"]:
            conditions.append(f"{options['num_samples']} sample(s) at temperature {temperature:g}")
        if (tokens := options["max_new_tokens"]) < ANSWER_TOKENS:
            conditions.append(f"answers of at most {tokens:,} tokens")
    else:
        complete, options = about is content, about["options"]
        cap = options["max_per_task"]
        names = ("label", "task_type", "examples", "correct", "random_baseline", "seconds")
        tasks = [TaskResult(**{name: task[name] for name in names}) for task in content["tasks"]]
        if length := options["max_length"]:
            conditions.append(f"prompts of at most {length:,} tokens")
        if kind == "core" and complete and len(tasks) != FULL_TASKS:
            conditions.append(f"{len(tasks)} of {FULL_TASKS} tasks")
    if cap:
        conditions.insert(0, f"at most {cap:,} per task")
    score = None
    if complete:
        score = content.get("chatcore") if kind == "chat" else content["core"]
    return Result(kind, stage, tag, about["step"], score, tasks, complete, conditions)


def latest(results: Sequence[Result], kind: Kind, *stages: str) -> Result | None:
    """Return the last evaluation of a kind, preferably complete, at these stages or at any."""
    chosen = [r for r in results if r.kind == kind and (not stages or r.stage in stages)]
    return next(reversed([result for result in chosen if result.complete] or chosen), None)
