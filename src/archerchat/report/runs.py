"""Read what a model's runs logged, merged across interruptions, and what its evaluations found.

A run that resumes from a checkpoint repeats the steps after it. `build_run` keeps the value that
the last session logged for a step, and drops what earlier sessions logged for later steps, so the
curves belong to the present weights.

A result's file under `evals/<stage>/<tag>` begins with its kind: `core_000960.json`,
`offline_000960_max8.json`, `chat_step_000420_Arithmetic-10.json`. While an evaluation runs, its
`.partial.json` has the finished tasks; CORE's describes the evaluation under `key`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from typing import Any, Literal

from archerchat.config import STAGES
from archerchat.errors import UsageError
from archerchat.evals.chat import ANSWER_TOKENS
from archerchat.evals.core.evaluate import FULL_TASKS
from archerchat.evals.statistics import TaskResult
from archerchat.files import UNREADABLE
from archerchat.home import Home
from archerchat.model.config import ModelConfig
from archerchat.training.state import OVERFIT_SHARE
from archerchat.training.telemetry import read_records

STEP_METRIC = "train/loss"
"""Metric that is logged with every step of training."""
CLOCK = "train/seconds"
"""Metric with the time spent in training steps since the beginning of the run."""
WARMUP_POINTS = 5
"""Steps after the start that typical speeds leave out."""
RENAMES = "renamed.json"
"""File under the home that lists renamed models in order (`archerchat models rename`)."""


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
    renames: list[dict[str, Any]] = field(default_factory=list)
    """Renamings of models since the last session."""

    def setting(self, *path: str) -> Any:
        """Return the value at `path` in the configuration, or None."""
        value: Any = self.config
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def values(self, metric: str) -> list[float]:
        """Return the finite values of a metric, by step."""
        return [value for value in self.metrics.get(metric, {}).values() if math.isfinite(value)]

    def typical(self, metric: str) -> float | None:
        """Return the median of a metric after the first steps."""
        values = self.values(metric)[WARMUP_POINTS:]
        return median(values) if values else None

    def last(self, metric: str) -> float | None:
        """Return the last finite value of a metric."""
        return next(reversed(self.values(metric)), None)

    @property
    def stage(self) -> str:
        stage = self.setting("stage")
        return stage if stage in STAGES else "base"

    @property
    def base(self) -> str | None:
        """Present name of the model that the run started from."""
        return self._renamed(self.setting("identity", "base", "tag"))

    @property
    def model_tag(self) -> str:
        """Present name of the model that the run trained."""
        base = self.setting("identity", "base", "tag")
        given = self.setting("config", "output_tag" if base else "model_tag")
        depth = self.setting("model_config", "num_layers")
        return str(self._renamed(given or base or (f"d{depth}" if depth else self.tag)))

    def _renamed(self, tag: str | None) -> str | None:
        for rename in self.renames:
            tag = rename["to"] if tag == rename["from"] else tag
        return tag

    @property
    def model(self) -> ModelConfig | None:
        """Shape of the model; None if the journal has none that this version can build."""
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
        if not bits or not losses:
            return False
        best = min(bits, key=lambda step: bits[step])
        worse = bits[max(bits)] > bits[best] * (1 + OVERFIT_SHARE)
        return worse and losses[max(losses)] < losses.get(best - 1, math.inf)


def run_tags(home: Home) -> list[str]:
    """Return the names of the runs that have journals, in alphabetical order."""
    folder = home.root / "runs"
    return sorted(path.parent.name for path in folder.glob("*/journal") if path.is_dir())


def read_renames(home: Home) -> list[dict[str, Any]]:
    """Return `from`, `to` and `time` of each renaming."""
    path = home.root / RENAMES
    renames: list[dict[str, Any]] = json.loads(path.read_bytes()) if path.exists() else []
    return renames


def load_run(home: Home, tag: str, num_records: int | None = None) -> Run:
    """Read run `tag`, or only its first records.

    Raises:
        DataError: a journal is damaged.
        UsageError: there is no such run, or `tag` cannot be a run's name.
    """
    run = build_run(tag, islice(read_records(home, tag), num_records))
    if not run.num_sessions:
        raise _no_such_run(home, tag)
    # A session adds a file to the journals. A rename before the last was of another model.
    last = (home.run_dir(tag) / "journal").stat().st_mtime
    run.renames = [rename for rename in read_renames(home) if rename["time"] >= last]
    return run


def _no_such_run(home: Home, tag: str) -> UsageError:
    names = ", ".join(run_tags(home)) or "none: train one, or pull it with endlex"
    return UsageError(f"there is no run {tag!r} in {home.root / 'runs'}; there is {names}")


def build_run(tag: str, records: Iterable[Mapping[str, Any]]) -> Run:
    """Merge the records of all of a trainer's sessions."""
    run, is_trainer, has_trained, last = Run(tag), False, False, 0.0
    for record in records:
        kind, time, step = record["type"], record["time"], record.get("step", 0)
        if kind == "session" and (is_trainer := record.get("kind", "trainer") == "trainer"):
            run.config, run.host = record.get("config") or {}, str(record.get("host") or "")
            run.status, run.num_sessions = "not finished", run.num_sessions + 1
            run.start, last, has_trained = min(run.start, time), time, False
        if not is_trainer:
            continue
        run.wall_seconds += max(0.0, time - last)
        run.end, last = max(run.end, time), max(last, time)
        if kind == "metrics":
            values = record["values"]
            if STEP_METRIC in values and not has_trained:
                _forget_after(run, step)
                has_trained = True
            if CLOCK in values:
                start = values[CLOCK] if step else 0.0  # where the step before is not known
                start = run.metrics.get(CLOCK, {}).get(step - 1, start)
                run.training_seconds += values[CLOCK] - start
            run.eval_seconds += values.get("eval/seconds", 0.0) + values.get("core/seconds", 0.0)
            for name, value in values.items():
                run.metrics.setdefault(name, {})[step] = float(value)
        elif kind == "text":
            run.texts.setdefault(record["name"], {})[step] = record["text"]
        elif kind == "finish":
            run.status = record["status"]
    run.metrics = {name: dict(sorted(v.items())) for name, v in run.metrics.items() if v}
    run.texts = {name: dict(sorted(t.items())) for name, t in run.texts.items() if t}
    return run


def _forget_after(run: Run, step: int) -> None:
    """Drop metrics of training from `step` on, and everything else from the step after it."""
    kept: list[tuple[str, dict[int, Any]]] = [*run.metrics.items(), *run.texts.items()]
    for name, points in kept:
        first = step if name.startswith("train/") else step + 1
        for old in [s for s in points if s >= first]:
            del points[old]


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
        tag = max(tags, key=lambda name: (home.run_dir(name) / "journal").stat().st_mtime_ns)
    known = []
    for name in tags:  # the first record says which model a run trained
        with suppress(UsageError):  # another program's journal
            known.append(load_run(home, name, num_records=1))
    chosen = [run for run in known if tag in (run.tag, run.model_tag)]
    if not chosen:
        raise _no_such_run(home, tag or "")
    # Where a run of a stage has that very name, others of the same model are side tracks.
    named = {run.stage for run in chosen if run.tag == tag}
    chosen = [run for run in chosen if run.tag == tag or run.stage not in named]
    for i, stage in reversed([*enumerate(STAGES)]):
        bases = {run.base for run in chosen if run.stage in STAGES[i + 1 :]}
        bases -= {run.model_tag for run in chosen if run.stage == stage}
        chosen += [run for run in known if run.stage == stage and run.model_tag in bases]
    loaded = [load_run(home, run.tag) for run in chosen]
    return sorted(loaded, key=lambda run: (STAGES.index(run.stage), run.start))


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
        """Whether the score can be compared with published ones."""
        return self.score is not None and not self.conditions


def load_results(home: Home, stage: str, tag: str) -> list[Result]:
    """Return the evaluations of a model at a stage, by step; of a step, the fullest is last.

    Those without a score, because tasks are missing, come first. Damaged files are skipped.
    """
    results = []
    for kind in SCORES:
        for path in (home.root / "evals" / stage / tag).glob(f"{kind}_*.json"):
            with suppress(*UNREADABLE, KeyError, TypeError, AttributeError):
                results.append(_read(kind, stage, tag, json.loads(path.read_bytes())))

    def fullness(result: Result) -> tuple[bool, int, int, int]:
        examples = sum(task.examples for task in result.tasks)
        return result.score is not None, result.step, examples, -len(result.conditions)

    return sorted(results, key=fullness)


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


def gather(home: Home, tag: str | None) -> tuple[list[Run], list[Result]]:
    """Read the runs of a model, as `load_family` does, and the results of its stages."""
    runs = load_family(home, tag)
    places = dict.fromkeys((run.stage, run.model_tag) for run in runs)
    # After a partial pull an evaluation may exist without the journal of its run.
    places |= dict.fromkeys((stage, runs[-1].model_tag) for stage in STAGES)
    return runs, [r for stage, tag in places for r in load_results(home, stage, tag)]
