"""Read runs from their journals, merged across interruptions.

A run that resumes from a checkpoint repeats the steps after it. `build_run` keeps the value that
the last session logged for a step, and drops what earlier sessions logged for later steps, so the
curves belong to the present weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from archerchat.errors import UsageError
from archerchat.home import Home
from archerchat.model.config import ModelConfig
from archerchat.training.loop import OVERFIT_SHARE
from archerchat.training.telemetry import read_records

STAGES = ("base", "sft", "rl")
STEP_METRIC = "train/loss"
"""Metric that is logged with every step of training."""
RENAMES = "renamed.json"
"""File under the home that lists renamed models in order (`archerchat models rename`)."""
CLOCK = "train/seconds"
"""Metric with the time spent in training steps since the beginning of the run."""


@dataclass
class Run:
    """Everything that a report needs about a run, over all of its sessions (processes)."""

    tag: str
    num_sessions: int = 0
    start: float = math.inf
    """Unix seconds, as `end`."""
    end: float = 0.0
    config: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the last session, like `host` and `status`."""
    host: str = ""
    status: str = ""
    wall_seconds: float = 0.0
    """Time within sessions."""
    training_seconds: float = 0.0
    eval_seconds: float = 0.0
    metrics: dict[str, dict[int, float]] = field(default_factory=dict)
    """Values by name, then by step in ascending order."""
    texts: dict[str, dict[int, str]] = field(default_factory=dict)
    """Samples by name, then by step in ascending order."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Present names of models, by the names in the journal."""

    def setting(self, *path: str) -> Any:
        """Return the value at `path` in the configuration, or None."""
        value: Any = self.config
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    @property
    def stage(self) -> str:
        stage = self.setting("stage")
        return stage if stage in STAGES else "base"

    @property
    def base(self) -> str | None:
        """Name of the model that the run started from."""
        tag = self.setting("identity", "base", "tag")
        return self.renamed.get(tag, str(tag)) if tag else None

    @property
    def depth(self) -> int | None:
        depth = self.setting("model_config", "num_layers")
        return depth if isinstance(depth, int) else None

    @property
    def model_tag(self) -> str:
        """Name of the model that the run trained."""
        given = self.setting("config", "output_tag" if self.base else "model_tag")
        tag = str(given or self.base or (f"d{self.depth}" if self.depth else self.tag))
        return self.renamed.get(tag, tag)

    @property
    def model(self) -> ModelConfig | None:
        """Shape of the model, if the journal has it."""
        try:
            return ModelConfig(**self.setting("model_config"))
        except (TypeError, ValueError, ArithmeticError, AssertionError):
            return None

    @property
    def device(self) -> str:
        return str(self.setting("hardware", "device") or "not recorded")

    @property
    def steps(self) -> int:
        """Number of trained steps; repeated ones count once."""
        return max(self.metrics.get(STEP_METRIC, {}), default=-1) + 1

    @property
    def overfitting(self) -> bool:
        """Whether validation got worse after its best step while the training loss kept falling."""
        bits, losses = self.metrics.get("val/bpb", {}), self.metrics.get("train/smooth_loss", {})
        best = min(bits, key=lambda step: bits[step], default=0)
        if not bits or not losses or not bits[max(bits)] > bits[best] * (1 + OVERFIT_SHARE):
            return False
        return losses[max(losses)] < losses.get(best - 1, math.inf)

    def values(self, metric: str) -> list[float]:
        """Return the finite values of a metric, by step."""
        return [value for value in self.metrics.get(metric, {}).values() if math.isfinite(value)]

    def last(self, metric: str) -> float | None:
        """Return the last finite value of a metric."""
        return next(reversed(self.values(metric)), None)


def run_tags(home: Home) -> list[str]:
    """Return the names of the runs that have journals, in alphabetical order."""
    folder = home.root / "runs"
    return sorted(path.parent.name for path in folder.glob("*/journal") if path.is_dir())


def load_run(home: Home, tag: str) -> Run:
    """Read run `tag`.

    Raises:
        DataError: a journal is damaged.
        UsageError: there is no such run, or `tag` cannot be a run's name.
    """
    run = _read(home, tag, read_records(home, tag))
    if run is None:
        raise _no_such_run(home, tag)
    return run


def read_renames(home: Home) -> list[dict[str, Any]]:
    """Return `from`, `to` and `time` of each renaming."""
    path = home.root / RENAMES
    renames: list[dict[str, Any]] = json.loads(path.read_bytes()) if path.exists() else []
    return renames


def _read(home: Home, tag: str, records: Iterable[Mapping[str, Any]]) -> Run | None:
    """Build a run with the present names of its models."""
    if (run := build_run(tag, records)) is None:
        return None
    # A session adds a file to the journals. A rename before the last session was of another model.
    last = (home.run_dir(tag) / "journal").stat().st_mtime
    for rename in read_renames(home):
        if rename["time"] >= last:
            old, new = rename["from"], rename["to"]
            run.renamed = {k: new if v == old else v for k, v in run.renamed.items()} | {old: new}
    return run


def _no_such_run(home: Home, tag: str) -> UsageError:
    names = ", ".join(run_tags(home)) or "none: train one, or pull it with endlex"
    return UsageError(f"there is no run {tag!r} in {home.root / 'runs'}; there is {names}")


def build_run(tag: str, records: Iterable[Mapping[str, Any]]) -> Run | None:
    """Merge the records of all sessions; None without a trainer's session."""
    run = Run(tag)
    is_trainer, has_trained, last = False, False, 0.0
    for record in records:
        kind, time = record["type"], record["time"]
        if kind == "session" and (is_trainer := record.get("kind", "trainer") == "trainer"):
            run.config, run.host = record.get("config") or {}, str(record.get("host") or "")
            run.status = "not finished"
            run.num_sessions += 1
            run.start, last, has_trained = min(run.start, time), time, False
        if not is_trainer:
            continue
        run.wall_seconds += max(0.0, time - last)
        run.end, last = max(run.end, time), max(last, time)
        if kind == "metrics":
            if STEP_METRIC in record["values"] and not has_trained:
                _forget_after(run, record["step"])
                has_trained = True
            _take_metrics(run, record["step"], record["values"])
        elif kind == "text":
            run.texts.setdefault(record["name"], {})[record["step"]] = record["text"]
        elif kind == "finish":
            run.status = record["status"]
    run.metrics = {name: dict(sorted(v.items())) for name, v in run.metrics.items() if v}
    run.texts = {name: dict(sorted(t.items())) for name, t in run.texts.items() if t}
    return run if run.num_sessions else None


def _take_metrics(run: Run, step: int, values: Mapping[str, float]) -> None:
    if CLOCK in values:
        start = values[CLOCK] if step else 0.0  # where the step before is not known
        run.training_seconds += values[CLOCK] - run.metrics.get(CLOCK, {}).get(step - 1, start)
    run.eval_seconds += values.get("eval/seconds", 0.0) + values.get("core/seconds", 0.0)
    for name, value in values.items():
        run.metrics.setdefault(name, {})[step] = float(value)


def _forget_after(run: Run, step: int) -> None:
    """Drop metrics of training from `step` on, and everything else from the step after it."""
    kept: list[tuple[str, dict[int, Any]]] = [*run.metrics.items(), *run.texts.items()]
    for name, points in kept:
        later = step if name.startswith("train/") else step + 1
        for old in [s for s in points if s >= later]:
            points.pop(old)


def load_family(home: Home, tag: str | None) -> list[Run]:
    """Return the runs that made model `tag`, ordered by stage; None means the latest run's model.

    These are the runs of that name, those that trained a model of that name, and those that trained
    the models it started from.

    Raises:
        UsageError: there is no such run.
        DataError: a journal is damaged.
    """
    tags = run_tags(home)
    if tag is None and tags:
        # A session adds a file to the run's journals.
        tag = max(tags, key=lambda name: (home.run_dir(name) / "journal").stat().st_mtime_ns)
    # The first record says which model a run trained; only the chosen runs are read whole.
    outlines = (_read(home, name, islice(read_records(home, name), 1)) for name in tags)
    known = [run for run in outlines if run is not None]
    chosen = [run for run in known if tag in (run.tag, run.model_tag)]
    if not chosen:
        raise _no_such_run(home, tag or "")
    # Where a run of a stage has that very name, others of the same model are side tracks.
    named = {run.stage for run in chosen if run.tag == tag}
    chosen = [run for run in chosen if run.tag == tag or run.stage not in named]
    while ancestors := [run for run in known if _is_ancestor(run, chosen)]:
        chosen += ancestors
    loaded = [load_run(home, run.tag) for run in chosen]
    return sorted(loaded, key=lambda run: (STAGES.index(run.stage), run.start))


def _is_ancestor(run: Run, chosen: list[Run]) -> bool:
    """Whether one of the chosen runs started from the model that this one trained."""
    if any((run.stage, run.model_tag) == (each.stage, each.model_tag) for each in chosen):
        return False
    later = STAGES[STAGES.index(run.stage) + 1 :]
    return any(each.stage in later and each.base == run.model_tag for each in chosen)
