"""Choose the charts of a run and of an evaluation."""

from __future__ import annotations

from statistics import median
from typing import Any

from archerchat.report.charts import Bars, Lines, Series
from archerchat.report.results import Result
from archerchat.report.runs import Run

GROUPS = (
    ("Rollouts", "share", {
        "rollout/reward": "mean reward",
        "rollout/solved_share": "solved",
        "rollout/learning_share": "informative",
        "rollout/cut_share": "truncated",
    }),
    ("Tokens of a step", "", {"rollout/tokens": "generated", "rollout/trained_tokens": "trained"}),
    ("Pass rate on the test", "", {f"val/pass_at_{k}": f"pass@{k}" for k in (1, 2, 4, 8, 16)}),
)  # fmt: skip
"""Metrics that share a chart: title, label of the axis, and labels by metric."""
NOT_DRAWN = ("train/", "data/", "core/", "eval/", "val/bpb")
"""Beginnings of metrics that have a chart of their own, or are not worth one."""
MAX_OTHERS = 12


def run_charts(run: Run) -> list[Lines]:
    """Return the charts of what a run logged."""
    rate = "train/matrix_lr" if "train/matrix_lr" in run.metrics else "train/lr_multiplier"
    of_peak = "" if rate == "train/matrix_lr" else "share of the peak"
    low, high = (run.metrics.get(f"core/{end}", {}) for end in ("low", "high"))
    core = _series(run, "core/score", band=[(x, low[x], high[x]) for x in low if x in high])
    charts = [
        _loss_chart(run),
        _throughput_chart(run),
        Lines("Learning rate of the matrices", "step", (_series(run, rate),), of_peak),
        Lines("CORE while training, 95% interval", "step", (core,)),
    ]
    for title, y_label, labels in GROUPS:
        named = enumerate(name for name in labels if name in run.metrics)
        curves = (_series(run, name, labels[name], color=i) for i, name in named)
        charts.append(Lines(title, "step", tuple(curves), y_label))
    grouped = {name for _, _, labels in GROUPS for name in labels}
    others = [n for n in run.metrics if n not in grouped and not n.startswith(NOT_DRAWN)]
    charts += [Lines(name, "step", (_series(run, name),)) for name in others[:MAX_OTHERS]]
    return [chart for chart in charts if any(len(each.points) > 1 for each in chart.series)]


def _series(run: Run, metric: str, label: str = "", **looks: Any) -> Series:
    return Series(label, tuple(run.metrics.get(metric, {}).items()), **looks)


def _loss_chart(run: Run) -> Lines:
    """Return training and validation loss.

    A policy's loss has no unit, and its validation is the pass rate.
    """
    raw = _series(run, "train/loss", kind="faint")
    smooth = _series(run, "train/smooth_loss", "training")
    validation = _series(run, "val/bpb", "validation", color=1, on_right=True)
    if run.stage == "rl":
        return Lines("Policy loss", "step", (raw, smooth))
    curves = (raw, smooth, validation) if validation.points else (raw, smooth)
    positive = all(value > 0 for series in curves for _, value in series.points)
    right = "bits per byte" if validation.points else ""
    return Lines("Loss", "step", curves, "nats per token", right, log_y=positive)


def _throughput_chart(run: Run) -> Lines:
    """Return tokens per second, with MFU on the right where it is proportional to them."""
    rates, shares = (run.metrics.get(f"train/{n}", {}) for n in ("tokens_per_second", "mfu"))
    ratios = [shares[step] / rate for step, rate in rates.items() if step in shares and rate > 0]
    scale = 100 * median(ratios) if ratios and max(ratios) <= 1.01 * min(ratios) else None
    curve = _series(run, "train/tokens_per_second")
    label = "MFU in %" if scale else ""
    return Lines("Throughput", "step", (curve,), "tokens/s", label, scale, from_zero=True)


def result_chart(result: Result) -> Bars:
    """Return the centred accuracies of an evaluation's tasks, the highest first."""
    ranked = sorted(result.tasks, key=lambda task: task.centred, reverse=True)
    bars = [(t.label, t.centred, t.centred_interval, f"{t.accuracy:.1%}") for t in ranked]
    return Bars("Centred accuracy", bars)
