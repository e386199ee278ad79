"""Read what evaluations left under the home's `evals/<stage>/<tag>`: CORE, ChatCORE, bits per byte.

Files are told apart by what they hold, not by their names, and what a file lacks is None: an
evaluation that was interrupted, or made by another version, still has its place in the report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from archerchat.evals.offline_tasks import PREFIX
from archerchat.evals.statistics import wilson_interval
from archerchat.home import Home

Kind = Literal["core", "offline", "chat", "bits"]


@dataclass(frozen=True)
class TaskScore:
    """One task's outcome."""

    label: str
    accuracy: float
    centred: float | None
    """Where guessing is 0 and perfection 1."""
    baseline: float | None
    examples: int | None
    interval: tuple[float, float] | None
    """95 % confidence of the accuracy."""
    seconds: float | None


@dataclass(frozen=True)
class Result:
    """One evaluation of one checkpoint."""

    kind: Kind
    stage: str
    tag: str
    step: int | None
    score: float | None
    """CORE, ChatCORE, or the mean centred accuracy of the offline tasks."""
    tasks: tuple[TaskScore, ...]
    complete: bool
    cap: int | None
    """Examples a task at most; None where all were asked, or the file does not say."""
    bits_per_byte: Mapping[str, float]
    """By split."""
    seconds: float
    """Over all tasks."""
    time: float
    """When the file was written, in Unix seconds."""
    path: Path


def load_results(home: Home, stage: str, tag: str) -> list[Result]:
    """Return the evaluations of a model at a stage, the oldest first."""
    found = []
    for path in (home.root / "evals" / stage / tag).glob("**/*.json"):
        result = read_result(path, stage, tag)
        if result is not None:
            found.append(result)
    return sorted(found, key=lambda result: (result.step or 0, result.time))


def read_result(path: Path, stage: str, tag: str) -> Result | None:
    """Read one file; None if it is no evaluation."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        time = path.stat().st_mtime
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    tasks = _read_tasks(content.get("tasks"))
    bits = content.get("bits_per_byte")
    bits = {str(k): v for k, v in bits.items() if _is_number(v)} if isinstance(bits, dict) else {}
    kind = _kind_of(content, tasks, bool(bits))
    if kind is None or not (tasks or bits):
        return None
    score = next((content[k] for k in ("chatcore", "core") if _is_number(content.get(k))), None)
    centred = [task.centred for task in tasks]
    # CORE's unfinished files hold what they belong to as `key`, and the tasks that are done.
    partial = isinstance(content.get("key"), dict)
    content = content["key"] | content if partial else content
    complete = content.get("complete", True) is True and not partial
    if score is None and kind == "offline" and complete:
        known = [value for value in centred if value is not None]
        score = sum(known) / len(known) if known and len(known) == len(tasks) else None
    step = content.get("step")
    options = content.get("options")
    cap = options.get("max_per_task") if isinstance(options, dict) else None
    return Result(
        kind=kind,
        stage=stage,
        tag=tag,
        step=step if isinstance(step, int) else None,
        score=score,
        tasks=tasks,
        complete=complete,
        cap=cap if isinstance(cap, int) else None,
        bits_per_byte=bits,
        seconds=sum(task.seconds or 0.0 for task in tasks) or _positive(content.get("seconds")),
        time=time,
        path=path,
    )


def _kind_of(content: Mapping[str, Any], tasks: Sequence[TaskScore], has_bits: bool) -> Kind | None:
    """Tell what was evaluated."""
    if "chatcore" in content or "sampling" in content:
        return "chat"
    if tasks and all(task.label.startswith(PREFIX) for task in tasks):
        return "offline"
    if "core" in content or "tasks" in content:
        return "core"
    return "bits" if has_bits else None


def _read_tasks(tasks: Any) -> tuple[TaskScore, ...]:
    if isinstance(tasks, dict):
        named = [(str(label), task) for label, task in tasks.items()]
    elif isinstance(tasks, list):
        named = [(str(task.get("label")), task) for task in tasks if isinstance(task, dict)]
    else:
        return ()
    scores = []
    for label, task in named:
        if not isinstance(task, dict) or not _is_number(task.get("accuracy")):
            continue
        counts = [task.get(name) for name in ("examples", "problems")]
        interval = _read_interval(task.get("interval_95")) or _interval_of(task)
        scores.append(
            TaskScore(
                label=label,
                accuracy=task["accuracy"],
                centred=_first_number(task, "centred", "centered"),
                baseline=_first_number(task, "random_baseline", "baseline"),
                examples=next((count for count in counts if isinstance(count, int)), None),
                interval=interval,
                seconds=_first_number(task, "seconds"),
            )
        )
    return tuple(scores)


def _interval_of(task: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the interval of a share of examples, where the task has their counts."""
    correct, examples = task.get("correct"), task.get("examples")
    if not isinstance(correct, int) or not isinstance(examples, int):
        return None
    return wilson_interval(correct, examples) if 0 <= correct <= examples > 0 else None


def _read_interval(value: Any) -> tuple[float, float] | None:
    two = isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
    return (value[0], value[1]) if two else None


def _first_number(task: Mapping[str, Any], *names: str) -> float | None:
    return next((task[name] for name in names if _is_number(task.get(name))), None)


def _positive(value: Any) -> float:
    return max(0.0, value) if _is_number(value) else 0.0


def _is_number(value: Any) -> bool:
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return usable and math.isfinite(value)


def latest(results: Sequence[Result], kind: Kind) -> Result | None:
    """Return the last evaluation of a kind; a complete one where there is any."""
    chosen = [result for result in results if result.kind == kind]
    whole = [result for result in chosen if result.complete]
    return (whole or chosen)[-1] if chosen else None
