"""Report how loss falls with size over several runs: the law, its errors, what it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from archerchat import __version__
from archerchat.errors import UsageError
from archerchat.home import Home
from archerchat.model.flops import count_parameters
from archerchat.report.charts import Lines, Series, compact
from archerchat.report.document import Document
from archerchat.report.runs import load_run
from archerchat.report.scaling import Array, Law, fit_law, optimal_split

Parameters = Literal["scaling", "total"]
BOTH_SIZES = 6
"""Runs that the law of two sizes takes at least: one more than it has unknowns."""
WITH_FLOOR = 4
"""Runs that a power law with a floor takes at least, likewise."""
SAME_DIRECTION = 0.98
"""Correlation of two sizes from which on their effects cannot be told apart."""
DISTINCT = 3
"""Values of each size from which on its factor, its exponent and the floor can be told apart."""
AHEAD = 10.0
"""How many times the compute of the largest run the law is extrapolated to."""
MAX_SIZES = 6
"""Numbers of parameters with a curve of their own."""


@dataclass(frozen=True)
class SizedRun:
    """One run of the series, at its end."""

    tag: str
    parameters: int
    tokens: float
    flops: float
    loss: float
    finished: bool


@dataclass(frozen=True)
class Fit:
    """The law that a series of runs allows, and why it is that one."""

    law: Law
    reason: str

    @property
    def both(self) -> bool:
        """Whether parameters and tokens have terms of their own; else it is over compute."""
        return len(self.law.exponents) == 2

    def predict(self, run: SizedRun) -> float:
        return float(self.law.predict(*(run.parameters, run.tokens) if self.both else (run.flops,)))

    @property
    def formula(self) -> str:
        names = ("N", "D") if self.both else ("C",)
        pairs = zip(self.law.factors, names, self.law.exponents, strict=True)
        terms = [f"{factor:.4g} / {name}^{exponent:.4f}" for factor, name, exponent in pairs]
        floor = [] if self.law.floor is None else [f"{self.law.floor:.4f}"]
        return f"L({', '.join(names)}) = {' + '.join(floor + terms)}"

    @property
    def unknowns(self) -> list[tuple[str, float, list[float]]]:
        """Each unknown of the law: name, value, and its values when one run is left out."""
        laws = (self.law, *self.law.without_one)
        floors = [law.floor for law in laws if law.floor is not None]
        names = ("alpha, of parameters", "beta, of tokens") if self.both else ("exponent",)
        exponents = zip(*(law.exponents for law in laws), strict=True)
        columns = [("E, the floor", floors), *zip(names, exponents, strict=True)]
        return [(name, values[0], list(values[1:])) for name, values in columns if values]


def gather_sizes(
    home: Home, tags: Sequence[str], metric: str, parameters: Parameters
) -> list[SizedRun]:
    """Read the end of each run, the smallest compute first.

    Raises:
        UsageError: a run does not exist, or did not log what is needed.
        DataError: a journal is damaged.
    """
    found = []
    for tag in tags:
        run = load_run(home, tag)
        figures = {name: run.last(name) or 0.0 for name in (metric, "train/tokens", "train/flops")}
        absent = [name for name, value in figures.items() if value <= 0]
        absent += [] if run.model else ["the shape of its model"]
        if run.model is None or absent:
            raise UsageError(
                f"run {tag!r} has not logged {', '.join(absent)} (above 0): leave the run out or "
                "choose another --metric"
            )
        counts = count_parameters(run.model)
        size = counts.scaling if parameters == "scaling" else counts.total
        loss, tokens, flops = figures.values()
        found.append(SizedRun(tag, size, tokens, flops, loss, run.status == "finished"))
    return sorted(found, key=lambda run: run.flops)


def fit_runs(runs: Sequence[SizedRun]) -> Fit:
    """Fit the richest law that the runs allow, which must not all have the same size."""
    if len({run.flops for run in runs}) < 2:
        raise UsageError("a law needs runs of at least two sizes, not 1: train more depths")
    losses, compute = [run.loss for run in runs], [[run.flops for run in runs]]
    sizes: list[list[float]] = [[run.parameters for run in runs], [run.tokens for run in runs]]
    terms, reason = compute, _why_compute(np.log(sizes))
    if not reason:
        terms, reason = sizes, f"{len(runs)} runs whose parameters and tokens vary independently."
    return Fit(fit_law(losses, terms, floor=len(runs) >= WITH_FLOOR), reason)


def _why_compute(logs: Array) -> str:
    """Say why a law can only be over compute; "" if it can be over both sizes, (2, runs)."""
    num_runs = logs.shape[1]
    if num_runs < WITH_FLOOR:
        return (
            f"{num_runs} runs are too few for a floor ({WITH_FLOOR} allow one): this is a plain "
            "power law over compute, which underestimates the loss when extrapolated far."
        )
    if num_runs < BOTH_SIZES:
        return (
            f"{num_runs} runs are too few to tell the effects of parameters and tokens apart "
            f"({BOTH_SIZES} could): the law is over compute."
        )
    varied = bool(np.all(logs.max(axis=1) - logs.min(axis=1) > 1e-9))
    if not varied or abs(np.asarray(np.corrcoef(logs))[0, 1]) >= SAME_DIRECTION:
        return (
            "In these runs tokens grow with parameters, as in a miniseries at one ratio, so their "
            "effects cannot be told apart: the law is over compute. To tell them apart, add runs "
            "of one depth with several --target-param-data-ratio."
        )
    distinct = min(len(set(np.round(row, 2))) for row in logs)
    if distinct < DISTINCT:
        return (
            f"These runs have only {distinct} different numbers of parameters or of tokens, and a "
            f"curve takes {DISTINCT}: the law is over compute."
        )
    return ""


def build_scaling_report(runs: Sequence[SizedRun], fit: Fit, metric: str) -> Document:
    """Return the document."""
    flops, falls = runs[-1].flops * AHEAD, min(fit.law.exponents) > 0
    best = optimal_split(fit.law, flops) if fit.both and falls else None
    sizes = best or (flops,)
    return Document(
        "scaling.md",
        version=__version__,
        metric=metric,
        runs=runs,
        fit=fit,
        falls=falls,
        charts=_charts(runs, fit, metric),
        ahead=f"{AHEAD:g}",
        flops=flops,
        best=best,
        predicted=float(fit.law.predict(*sizes)) if falls or not fit.both else None,
    )


def _charts(runs: Sequence[SizedRun], fit: Fit, metric: str) -> list[Lines]:
    dots = Series("runs", [(run.flops, run.loss) for run in runs], "dots")
    flops = np.geomspace(runs[0].flops, runs[-1].flops * AHEAD, 60).tolist()

    def chart(title: str, x_label: str, *series: Series) -> Lines:
        return Lines(f"{metric} {title}", x_label, series, log_x=True, log_y=True)

    if not fit.both:
        law = Series("law", [(c, float(fit.law.predict(c))) for c in flops], "dashed", color=1)
        return [chart("against compute", "FLOPs", law, dots)]
    sizes = sorted({run.parameters for run in runs})
    chosen = np.unique(np.linspace(0, len(sizes) - 1, MAX_SIZES).round().astype(int))
    tokens = np.geomspace(min(r.tokens for r in runs), max(r.tokens for r in runs) * 2, 40).tolist()
    series = []
    for color, size in enumerate(sizes[i] for i in chosen):
        curve = [(d, float(fit.law.predict(size, d))) for d in tokens]
        mine = [(run.tokens, run.loss) for run in runs if run.parameters == size]
        series.append(Series("", curve, "dashed", color))
        series.append(Series(compact(size), mine, "dots", color))
    over_compute = [dots]
    if min(fit.law.exponents) > 0:
        best = [(c, float(fit.law.predict(*optimal_split(fit.law, c)))) for c in flops]
        over_compute.insert(0, Series("best split", best, "dashed", color=1))
    return [
        chart("by parameters", "tokens", *series),
        chart("against compute", "FLOPs", *over_compute),
    ]
