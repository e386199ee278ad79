"""The charts of a run: the figures that every recipe logs, then whatever else it logged."""

from __future__ import annotations

from archerchat.report.charts import LineChart, Series
from archerchat.report.runs import Run

HIDDEN = frozenset(
    {
        "train/last_micro_batch_loss",
        "train/smooth_loss",
        "train/loss",
        "train/lr_multiplier",
        "train/matrix_lr",
        "train/muon_momentum",
        "train/muon_weight_decay",
        "train/tokens_per_second",
        "train/mfu",
        "train/seconds",
        "train/tokens",
        "train/flops",
        "train/memory_bytes",
        "train/grad_scale",
        "val/bpb",
        "eval/seconds",
    }
)
"""Shown in a chart of their own, or not worth one."""
OWN = ("data/", "core/")
"""Prefixes of figures that are not drawn one by one."""
MOST_OTHERS = 12


def run_charts(run: Run) -> list[LineChart]:
    """Return the charts of what a run logged."""
    loss = _series(run, "train/loss", "loss of a step", "faint")
    smooth = _series(run, "train/smooth_loss", "smoothed", "curve")
    charts = [
        LineChart("Training loss (nats per token)", "step", (*loss, *smooth), trim=True),
        LineChart("Validation bits per byte", "step", _series(run, "val/bpb", "val/bpb")),
    ]
    rates = _series(run, "train/matrix_lr", "matrices")
    if rates:
        charts.append(LineChart("Learning rate of the matrices", "step", rates))
    else:
        rates = _series(run, "train/lr_multiplier", "multiplier")
        charts.append(LineChart("Learning rate, as a share of its peak", "step", rates))
    for title, name, is_share in (
        ("Tokens per second", "train/tokens_per_second", False),
        ("Model FLOPs utilisation", "train/mfu", True),
    ):
        charts.append(
            LineChart(title, "step", _series(run, name, ""), percent=is_share, from_zero=True)
        )
    core = _series(run, "core/score", "on a part of each task")
    interval = (
        *_series(run, "core/low", "95 % interval", "dashed"),
        *_series(run, "core/high", "", "dashed"),
    )
    charts.append(LineChart("CORE while training", "step", (*core, *interval)))
    others = [name for name in run.metrics if not name.startswith(OWN) and name not in HIDDEN]
    for name in others[:MOST_OTHERS]:
        charts.append(LineChart(name, "step", _series(run, name, name)))
    return [chart for chart in charts if any(len(each.points) > 1 for each in chart.series)]


def _series(run: Run, metric: str, label: str, kind: str = "curve") -> tuple[Series, ...]:
    points = [(p.step, p.value) for p in run.metrics.get(metric, ())]
    return (Series(label, points, kind=kind),) if points else ()
