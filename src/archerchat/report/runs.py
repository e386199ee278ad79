"""Read what runs left: their journals, put together over interruptions, and their summaries.

A run that goes on from a checkpoint repeats the steps after it. `load_run` keeps, of every metric,
what the last session says of a step, and drops what an earlier one says of later steps: the curve
of the weights that are there now.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from archerchat.errors import UsageError
from archerchat.home import Home
from archerchat.training.stage import SUMMARY
from archerchat.training.telemetry import read_records

STAGES = ("base", "sft", "rl")
STEP_METRIC = "train/loss"
"""What a session logs with every step that it trains."""


@dataclass(frozen=True)
class Point:
    """A metric's value at a step."""

    step: int
    value: float


@dataclass
class Session:
    """One process that wrote to the run."""

    start: float
    """Unix seconds, as `end`."""
    end: float
    host: str
    config: Mapping[str, Any]
    status: str | None = None
    """How it said that it ended; None if it did not, or has not yet."""
    training_seconds: float = 0.0
    """In training steps of this session."""
    eval_seconds: float = 0.0
    steps: int = 0


@dataclass
class Run:
    """Everything a report needs of a run."""

    tag: str
    sessions: list[Session] = field(default_factory=list)
    metrics: dict[str, list[Point]] = field(default_factory=dict)
    """By name, in the order of steps."""
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        """What the last session ran with: the resolved configuration and what it decided."""
        return self.sessions[-1].config

    @property
    def stage(self) -> str:
        stage = self.config.get("stage")
        return stage if stage in STAGES else "base"

    @property
    def model_tag(self) -> str:
        """The name of the model that the run trained."""
        given = lookup(self.config, "config", "output_tag" if self.base else "model_tag")
        if isinstance(given, str):
            return given
        depth = self.depth
        return (self.base or self.tag) if self.base or depth is None else f"d{depth}"

    @property
    def base(self) -> str | None:
        """The name of the model that the run started from."""
        tag = lookup(self.config, "identity", "base", "tag")
        return tag if isinstance(tag, str) else None

    @property
    def depth(self) -> int | None:
        depth = lookup(self.config, "model_config", "num_layers")
        return depth if isinstance(depth, int) else None

    def last(self, metric: str) -> float | None:
        """Return the last finite value of a metric."""
        points = self.metrics.get(metric, ())
        return next((p.value for p in reversed(points) if math.isfinite(p.value)), None)

    def best(self, metric: str) -> float | None:
        """Return the lowest finite value of a metric."""
        values = [p.value for p in self.metrics.get(metric, ()) if math.isfinite(p.value)]
        return min(values, default=None)

    @property
    def steps(self) -> int:
        """Steps trained, those that were done twice counted once."""
        points = self.metrics.get(STEP_METRIC)
        return points[-1].step + 1 if points else 0

    @property
    def status(self) -> str:
        return self.sessions[-1].status or "not finished"


def lookup(value: Any, *path: str) -> Any:
    """Return what stands at `path` in nested mappings, or None where there is no such place."""
    for name in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def run_tags(home: Home) -> list[str]:
    """Return the names of the runs that have journals, in alphabetical order."""
    folder = home.root / "runs"
    return sorted(path.parent.name for path in folder.glob("*/journal") if path.is_dir())


def load_run(home: Home, tag: str) -> Run | None:
    """Read run `tag`; None if nothing was recorded.

    Raises:
        DataError: a journal is damaged.
        UsageError: `tag` cannot be a run's name.
    """
    run = build_run(tag, read_records(home, tag))
    if run is not None:
        run.summary = _read_summary(home.run_dir(tag) / SUMMARY)
    return run


def build_run(tag: str, records: Iterable[Mapping[str, Any]]) -> Run | None:
    """Put records together, session after session; those that are no trainer's are passed over."""
    run = Run(tag)
    session: Session | None = None
    values: dict[str, dict[int, float]] = {}
    texts: dict[str, dict[int, str]] = {}
    for record in records:
        kind, time = record.get("type"), _number(record.get("time"), 0.0)
        if kind == "session":
            trainer = record.get("kind", "trainer") == "trainer"
            config = record.get("config")
            session = None
            if trainer:
                config = config if isinstance(config, Mapping) else {}
                session = Session(time, time, str(record.get("host") or ""), config)
                run.sessions.append(session)
            continue
        if session is None:
            continue
        session.end = max(session.end, time)
        step, name = record.get("step"), record.get("name")
        if kind == "metrics" and isinstance(step, int):
            _take_metrics(session, values, texts, step, record.get("values"))
        elif kind == "text" and isinstance(step, int) and isinstance(name, str):
            texts.setdefault(name, {})[step] = str(record.get("text"))
        elif kind == "finish":
            session.status = str(record.get("status"))
    run.metrics = {
        name: [Point(step, value) for step, value in sorted(points.items())]
        for name, points in values.items()
        if points
    }
    run.texts = {name: sorted(points.items()) for name, points in texts.items() if points}
    return run if run.sessions else None


def _take_metrics(
    session: Session,
    values: dict[str, dict[int, float]],
    texts: dict[str, dict[int, str]],
    step: int,
    logged: Any,
) -> None:
    if not isinstance(logged, Mapping):
        return
    if STEP_METRIC in logged:
        if session.steps == 0:
            _forget_after(values, texts, step)
        session.steps += 1
        rate = _number(logged.get("train/tokens_per_second"), math.nan)
        before = _previous(values.get("train/seconds", {}))
        now = _number(logged.get("train/seconds"), math.nan)
        if math.isfinite(now):
            # `train/seconds` goes on from the checkpoint, whose own value the journal may lack.
            spent = now - before if session.steps > 1 else _step_seconds(values, rate, step, logged)
            session.training_seconds += max(0.0, spent)
    session.eval_seconds += max(0.0, _number(logged.get("eval/seconds"), 0.0))
    for name, value in logged.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            points = values.setdefault(str(name), {})
            points.pop(step, None)  # to stand last
            points[step] = float(value)


def _forget_after(
    values: dict[str, dict[int, float]], texts: dict[str, dict[int, str]], step: int
) -> None:
    """Drop what was said of training from `step` on, and of weights after it."""
    for name, points in values.items():
        later = step if name.startswith("train/") else step + 1
        for old in [s for s in points if s >= later]:
            del points[old]
    for passages in texts.values():
        for old in [s for s in passages if s > step]:
            del passages[old]


def _previous(points: dict[int, float]) -> float:
    return points[next(reversed(points))] if points else math.nan


def _step_seconds(
    values: Mapping[str, Mapping[int, float]], rate: float, step: int, logged: Mapping[str, Any]
) -> float:
    """Return how long a session's first step took: its tokens over its rate."""
    tokens = _number(logged.get("train/tokens"), math.nan)
    earlier = values.get("train/tokens", {}).get(step - 1, 0.0 if step == 0 else math.nan)
    seconds = (tokens - earlier) / rate if rate else math.nan
    return seconds if math.isfinite(seconds) else 0.0


def _number(value: Any, default: float) -> float:
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable and math.isfinite(value) else default


def _read_summary(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def load_family(home: Home, tag: str | None) -> list[Run]:
    """Return the runs that made model `tag`, stage after stage; of the latest run by default.

    They are those of that name, those that trained a model of that name, and those that trained
    what it started from.

    Raises:
        UsageError: there is no such run.
        DataError: a journal is damaged.
    """
    tags = run_tags(home)
    if tag is None and tags:
        tag = max(tags, key=lambda name: _modified(home.run_dir(name) / "journal"))
    # The first record says whose run it is; the rest is read of those that are chosen.
    outlines = [build_run(name, islice(read_records(home, name), 1)) for name in tags]
    known = [run for run in outlines if run is not None]
    chosen = [run for run in known if tag in (run.tag, run.model_tag)]
    if not chosen:
        names = ", ".join(run.tag for run in known) or "none: train one, or pull it with endlex"
        raise UsageError(f"there is no run {tag or ''!r} in {home.root / 'runs'}; there is {names}")
    # Where a run of a stage has that very name, others of the same model are side tracks.
    named = {run.stage for run in chosen if run.tag == tag}
    chosen = [run for run in chosen if run.tag == tag or run.stage not in named]
    while ancestors := [run for run in known if _is_ancestor(run, chosen)]:
        chosen += ancestors
    loaded = [run for each in chosen if (run := load_run(home, each.tag)) is not None]
    return sorted(loaded, key=lambda run: (STAGES.index(run.stage), run.sessions[0].start))


def _is_ancestor(run: Run, chosen: list[Run]) -> bool:
    """Say whether one of the chosen runs started from what this one trained."""
    if any((run.stage, run.model_tag) == (each.stage, each.model_tag) for each in chosen):
        return False
    later = STAGES[STAGES.index(run.stage) + 1 :]
    return any(each.stage in later and each.base == run.model_tag for each in chosen)


def _modified(folder: Path) -> float:
    return max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)
