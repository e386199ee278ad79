"""Report how a model was trained and how it scored: base, SFT and RL in one document."""

from __future__ import annotations

import json
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from archerchat.config import STAGES
from archerchat.evals.statistics import centred
from archerchat.model.flops import count_parameters
from archerchat.planning.gpus import Prices, find_gpu
from archerchat.report.charts import Bars, Lines, Series, compact
from archerchat.report.document import FOLDER, Document
from archerchat.report.runs import SCORES, Result, Run, latest

ROLLOUTS = {
    "rollout/reward": "mean reward",
    "rollout/solved_share": "solved",
    "rollout/learning_share": "informative",
    "rollout/cut_share": "truncated",
}
TOKENS = {"rollout/tokens": "generated", "rollout/trained_tokens": "trained"}
"""Metrics that share a chart, with their labels."""
MAX_LABEL = 32
"""Most characters of a task's name next to its bar."""


def build_training_report(
    runs: Sequence[Run], results: Sequence[Result], prices: Prices
) -> Document:
    """Return the document."""
    published = tomllib.loads((FOLDER / "published.toml").read_text(encoding="utf-8"))
    evaluations = [latest(results, kind, stage) for kind in SCORES for stage in STAGES]
    return Document(
        "training.md",
        runs=runs,
        published=published,
        counts=count_parameters(runs[0].model) if runs[0].model else None,
        tokens=sum(run.last("train/tokens") or 0 for run in runs),
        core=latest(results, "core", "base"),
        chat=latest(results, "chat"),
        evaluations=[result for result in evaluations if result and result.tasks],
        comparison=_compare(runs, results, published),
        spent=_spendings(runs, results, prices),
        prices=prices.per_hour(find_gpu(runs[0].device))[1],
        environment=_environment(runs),
        configuration=lambda run: json.dumps(run.config, indent=2, default=str),
        run_charts=run_charts,
        bars=result_chart,
    )


def _compare(
    runs: Sequence[Run], results: Sequence[Result], published: Mapping[str, Any]
) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Return the columns, which are stages and others' results, and by row its cells by column."""
    depth = runs[0].model.num_layers if runs[0].model else None
    reference = f"reference d{depth}"
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for run in runs:
        if (bits := run.last("val/bpb")) is not None:
            text = "text" if run.stage == "base" else "answers"
            cells[f"val bits per byte, {text}"][run.stage] = f"{bits:.4f}"
    for kind, name in SCORES.items():
        for result in filter(None, (latest(results, kind, stage) for stage in STAGES)):
            cells[name][result.stage] = _score(result)
            for task in result.tasks if kind == "chat" else ():
                cells[f"· {task.label}"][result.stage] = f"{task.accuracy:.1%}"
            if kind == "core" and result.is_whole:
                cells[name]["GPT-2 XL"] = str(published["core"]["GPT-2 XL"])
    cells["tokens"] = {r.stage: compact(n) for r in runs if (n := r.last("train/tokens"))}
    for name, figure in published["reference"].get(str(depth), {}).items():
        if name in cells:
            cells[name][reference] = str(figure)
    found = {run.stage for run in runs}.union(*cells.values())
    columns = [name for name in (*STAGES, reference, "GPT-2 XL") if name in found]
    return columns, {name: row for name, row in cells.items() if row}


def _score(result: Result) -> str:
    if result.score is None:
        return "some tasks" if result.complete else "unfinished"
    return " ".join([f"{result.score:z.4f}", *(f"({each})" for each in result.conditions)])


def _spendings(
    runs: Sequence[Run], results: Sequence[Result], prices: Prices
) -> list[dict[str, Any]]:
    """Return the time of each run and each evaluation, and its cost in dollars, None if unknown."""
    rows: list[dict[str, Any]] = []

    def add(name: str, run: Run, **seconds: float) -> None:
        price, _ = prices.per_hour(find_gpu(run.device))
        hours = sum(seconds.values()) / 3600 * (run.setting("hardware", "world_size") or 1)
        cost = None if price is None else hours * price
        rows.append({"name": name, "seconds": seconds, "cost": cost})

    for run in runs:
        training, evaluation = run.training_seconds, run.eval_seconds
        # A session's first record is written after its model is built.
        other = max(0.0, run.wall_seconds - training - evaluation)
        add(run.tag, run, training=training, evaluation=evaluation, other=other)
    for result in results:
        own = [r for r in runs if (r.stage, r.model_tag) == (result.stage, result.tag)]
        seconds = sum(task.seconds for task in result.tasks)
        name = f"{SCORES[result.kind]} of {result.stage}, step {result.step}"
        add(name, (own or runs)[-1], training=0.0, evaluation=seconds, other=0.0)
    return rows


def _environment(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the facts about each run's machine and software: by name, one value per run."""
    columns = [
        {"host": run.host}
        | (run.setting("environment") or {})
        | (run.setting("hardware") or {})
        | {name: run.setting(name) for name in ("attention", "compile")}
        | {"tokenizer": run.setting("tokenizer", "name") or run.setting("tokenizer")}
        | {"precision": run.setting("identity", "dtype")}
        for run in runs
    ]
    return {name: [each.get(name) for each in columns] for facts in columns for name in facts}


def run_charts(run: Run) -> list[Lines]:
    """Return the charts of a run's metrics; those without a curve are left out."""

    def curve(metric: str, label: str = "", **looks: Any) -> Series:
        return Series(label, [*run.metrics.get(metric, {}).items()], **looks)

    def curves(labels: Mapping[str, str]) -> list[Series]:
        known = [name for name in labels if name in run.metrics]
        return [curve(name, labels[name], color=i) for i, name in enumerate(known)]

    losses = [curve("train/loss", kind="faint"), curve("train/smooth_loss", "training")]
    if run.stage == "rl":
        loss = Lines("Policy loss", "step", losses)  # it has no unit
    else:
        bits = [curve("val/bpb", "validation", color=1, on_right=True)]
        losses += bits if "val/bpb" in run.metrics else []
        positive = all(value > 0 for each in losses for _, value in each.points)
        right = "bits per byte" if len(losses) > 2 else ""
        loss = Lines("Loss", "step", losses, "nats per token", right, log_y=positive)
    # The axis of MFU is on the right, if MFU is proportional to the speed.
    speeds, shares = (run.metrics.get(f"train/{n}", {}) for n in ("tokens_per_second", "mfu"))
    ratios = [
        shares[step] / speed for step, speed in speeds.items() if step in shares and speed > 0
    ]
    scale = 100 * median(ratios) if ratios and max(ratios) <= 1.01 * min(ratios) else None
    mfu, throughput = "MFU in %" if scale else "", curve("train/tokens_per_second")
    rate = "train/matrix_lr" if "train/matrix_lr" in run.metrics else "train/lr_multiplier"
    of_peak = "" if rate == "train/matrix_lr" else "share of the peak"
    low, high = (run.metrics.get(f"core/{end}", {}) for end in ("low", "high"))
    core = curve("core/score", band=[(x, low[x], high[x]) for x in low if x in high])
    passes = {n: n.replace("val/pass_at_", "pass@") for n in run.metrics if "/pass_at_" in n}
    charts = [
        loss,
        Lines("Throughput", "step", [throughput], "tokens/s", mfu, scale, from_zero=True),
        Lines("Learning rate of the matrices", "step", [curve(rate)], of_peak),
        Lines("CORE while training, 95% interval", "step", [core]),
        Lines("Rollouts", "step", curves(ROLLOUTS), "share"),
        Lines("Tokens of a step", "step", curves(TOKENS)),
        Lines("Seconds of the rollouts", "step", [curve("rollout/seconds")]),
        Lines("Pass rate on the test", "step", curves(passes)),
    ]
    return [chart for chart in charts if any(len(each.points) > 1 for each in chart.series)]


def result_chart(result: Result) -> Bars:
    """Return the centred accuracies of an evaluation's tasks, the highest first."""
    bars = []
    for task in sorted(result.tasks, key=lambda task: task.centred, reverse=True):
        low, high = (centred(limit, task.random_baseline) for limit in task.interval)
        bars.append((task.label[:MAX_LABEL], task.centred, (low, high), f"{task.accuracy:.1%}"))
    return Bars("Centred accuracy", bars)
