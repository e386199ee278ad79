"""Fit a scaling law to a series of runs, and report it: how loss falls with size.

    L(N, D) = E + A / N^alpha + B / D^beta

N is the number of parameters, D of tokens (Hoffmann et al. 2022, section 3.3). If their effects
cannot be separated, the law is E + A / C^alpha over compute. A short series gets one without E.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from archerchat import __version__
from archerchat.errors import UsageError
from archerchat.home import Home
from archerchat.model.flops import count_parameters
from archerchat.report.charts import Lines, Series, compact
from archerchat.report.document import Document
from archerchat.report.runs import load_run

Array = NDArray[np.float64]
Parameters = Literal["scaling", "total"]
BOTH_SIZES = 6
"""Fewest runs for a law of two sizes: one more than it has unknowns."""
WITH_FLOOR = 4
"""Fewest runs for a power law with a floor: one more than it has unknowns."""
SAME_DIRECTION = 0.98
"""Correlation of two sizes above which their effects cannot be separated."""
DISTINCT = 3
"""Fewest different values of a size that determine its factor, its exponent and the floor."""
AHEAD = 10.0
"""The law is extrapolated to this multiple of the largest run's compute."""
MAX_SIZES = 6
"""Most numbers of parameters that get their own curve."""
DELTA = 1e-3
"""Error of the log loss above which Huber's loss is linear."""
START_EXPONENTS = (0.15, 0.5)
START_FLOORS = (0.1, 0.5, 0.85)
"""E's shares of the loss at which the search starts."""


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
class Law:
    """A fitted law: floor + sum of factor / size^exponent."""

    floor: float | None
    """E, the loss at infinite size; None if the law has no floor."""
    factors: tuple[float, ...]
    exponents: tuple[float, ...]
    """For parameters and tokens, or for compute alone."""
    without_one: tuple[Law, ...] = ()
    """Laws fitted without one of the runs each; empty if too few would be left."""

    @property
    def both(self) -> bool:
        """Whether the law is over parameters and tokens; if not, it is over compute."""
        return len(self.exponents) == 2

    def predict(self, *sizes: Array | float) -> Array:
        """Return the loss at sizes, one argument per term."""
        terms = (
            f / np.asarray(s, dtype=float) ** e
            for f, s, e in zip(self.factors, sizes, self.exponents, strict=True)
        )
        return np.asarray(sum(terms, np.float64(self.floor or 0.0)))

    def predict_run(self, run: SizedRun) -> float:
        return float(self.predict(*((run.parameters, run.tokens) if self.both else (run.flops,))))

    def optimal_split(self, flops: float) -> tuple[float, float]:
        """Return the N and D with the lowest loss for FLOPs of 6 N D."""
        (a, b), (alpha, beta) = self.factors, self.exponents
        share = beta / (alpha + beta)
        parameters = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** share
        return parameters, flops / 6 / parameters

    def __str__(self) -> str:
        names = ("N", "D") if self.both else ("C",)
        pairs = zip(self.factors, names, self.exponents, strict=True)
        terms = [f"{factor:.4g} / {name}^{exponent:.4f}" for factor, name, exponent in pairs]
        floor = [] if self.floor is None else [f"{self.floor:.4f}"]
        return f"L({', '.join(names)}) = {' + '.join(floor + terms)}"

    @property
    def unknowns(self) -> list[tuple[str, float, list[float]]]:
        """Each unknown of the law: name, value, and its values without one of the runs."""
        laws = (self, *self.without_one)
        floors = [law.floor for law in laws if law.floor is not None]
        names = ("alpha, of parameters", "beta, of tokens") if self.both else ("exponent",)
        exponents = zip(*(law.exponents for law in laws), strict=True)
        columns = [("E, the floor", floors), *zip(names, exponents, strict=True)]
        return [(name, values[0], list(values[1:])) for name, values in columns if values]


def fit_law(losses: Sequence[float], sizes: Sequence[Sequence[float]], floor: bool = True) -> Law:
    """Return the law that is closest to the losses.

    Args:
        losses: one per run; positive.
        sizes: for each term of the law, its size in every run; positive.
        floor: whether the law has an E.
    """
    y, x = np.log(losses), np.log(sizes)
    # Centred, a factor is its term's share of the loss at the middle of the runs.
    middle, level = x.mean(axis=1), y.mean()
    lines = np.concatenate([np.zeros((int(floor), len(y))), x - middle[:, None]])
    starts = [
        np.array([*np.log([share] * floor + [(1 - share) / len(x)] * len(x)), *exponents])
        for share in (START_FLOORS if floor else (0.0,))
        for exponents in product(START_EXPONENTS, repeat=len(x))
    ]
    best = _minimize(y - level, lines, starts)

    def law(point: Array, without_one: Sequence[Law] = ()) -> Law:
        exponents = point[len(lines) :]
        factors = np.exp(point[int(floor) : len(lines)] + level + exponents * middle)
        constant = float(np.exp(point[0] + level)) if floor else None
        return Law(constant, tuple(factors.tolist()), tuple(exponents.tolist()), tuple(without_one))

    if len(y) == len(best):
        return law(best)
    rows = (np.arange(len(y)) != i for i in range(len(y)))
    return law(best, [law(_minimize(y[r] - level, lines[:, r], [best])) for r in rows])


def _minimize(target: Array, lines: Array, starts: list[Array]) -> Array:
    """Return the height of each term, then each size's exponent, with the least Huber loss.

    Args:
        target: log losses (runs).
        lines: a term's log size in each run (terms, runs); zeros for E, which has no exponent.
    """
    from scipy.optimize import least_squares  # takes half a second

    terms = len(lines)
    constant = 2 * terms - len(starts[0])

    def errors(point: Array) -> Array:
        exponents = np.concatenate([np.zeros(constant), point[terms:]])
        logs = point[:terms, None] - exponents[:, None] * lines
        return np.asarray(np.log(np.exp(logs).sum(axis=0)) - target)

    tight = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-14, "max_nfev": 200}
    fits = [
        # The slopes by a complex step, which is exact to the last digit.
        least_squares(errors, start, "cs", loss="huber", f_scale=DELTA, **tight)
        for start in starts
    ]
    return np.asarray(min(fits, key=lambda fit: float(fit.cost)).x)


def gather_sizes(
    home: Home, tags: Sequence[str], metric: str, parameters: Parameters
) -> list[SizedRun]:
    """Read the final figures of each run, ordered by compute.

    Raises:
        UsageError: a run does not exist, or did not log what is needed.
        DataError: a journal is damaged.
    """
    found = []
    for tag in tags:
        run = load_run(home, tag)
        logged = {name: run.metrics.get(name) for name in (metric, "train/tokens", "train/flops")}
        figures = {name: each[max(each)] if each else 0.0 for name, each in logged.items()}
        absent = [name for name, value in figures.items() if not 0 < value < np.inf]
        absent += [] if run.model else ["the shape of its model"]
        if run.model is None or absent:
            raise UsageError(
                f"run {tag!r} has not logged {', '.join(absent)} (above 0 and finite): leave the "
                "run out or choose another --metric"
            )
        counts = count_parameters(run.model)
        size = counts.scaling if parameters == "scaling" else counts.total
        loss, tokens, flops = figures.values()
        found.append(SizedRun(tag, size, tokens, flops, loss, run.status == "finished"))
    return sorted(found, key=lambda run: run.flops)


def fit_runs(runs: Sequence[SizedRun]) -> tuple[Law, str]:
    """Return the most detailed law that the runs allow, and the reason for it.

    Raises:
        UsageError: all runs took the same compute.
    """
    if len({run.flops for run in runs}) < 2:
        raise UsageError("a law needs runs of at least two sizes, not 1: train more depths")
    sizes: list[list[float]] = [[run.parameters for run in runs], [run.tokens for run in runs]]
    reason = _why_compute(np.log(sizes))
    terms = [[run.flops for run in runs]] if reason else sizes
    reason = reason or f"{len(runs)} runs whose parameters and tokens vary independently."
    return fit_law([run.loss for run in runs], terms, floor=len(runs) >= WITH_FLOOR), reason


def _why_compute(logs: Array) -> str:
    """Return why the law has to be over compute; "" if it can be over both sizes (2, runs)."""
    num_runs = logs.shape[1]
    if num_runs < WITH_FLOOR:
        return (
            f"{num_runs} runs are too few for a floor ({WITH_FLOOR} allow one): this is a plain "
            "power law over compute, which underestimates the loss when extrapolated far."
        )
    if num_runs < BOTH_SIZES:
        return (
            f"{num_runs} runs are too few to separate the effects of parameters and tokens "
            f"({BOTH_SIZES} could): the law is over compute."
        )
    distinct = [len(set(np.round(row, 2))) for row in logs]
    if min(distinct) == 1 or abs(np.asarray(np.corrcoef(logs))[0, 1]) >= SAME_DIRECTION:
        return (
            "In these runs tokens grow with parameters, as in a miniseries at one ratio, so their "
            "effects cannot be separated: the law is over compute. To separate them, add runs of "
            "one depth with several --target-param-data-ratio."
        )
    if min(distinct) < DISTINCT:
        return (
            f"These runs have only {min(distinct)} different numbers of parameters or of tokens, "
            f"and a curve takes {DISTINCT}: the law is over compute."
        )
    return ""


def build_scaling_report(runs: Sequence[SizedRun], law: Law, reason: str, metric: str) -> Document:
    """Return the document."""
    flops, falls = runs[-1].flops * AHEAD, min(law.exponents) > 0
    best = law.optimal_split(flops) if law.both and falls else None
    return Document(
        "scaling.md",
        version=__version__,
        metric=metric,
        runs=runs,
        law=law,
        reason=reason,
        falls=falls,
        charts=_charts(runs, law, metric),
        ahead=f"{AHEAD:g}",
        flops=flops,
        best=best,
        predicted=float(law.predict(*(best or (flops,)))) if falls or not law.both else None,
    )


def _charts(runs: Sequence[SizedRun], law: Law, metric: str) -> list[Lines]:
    dots = Series("runs", [(run.flops, run.loss) for run in runs], "dots")
    flops = np.geomspace(runs[0].flops, runs[-1].flops * AHEAD, 60).tolist()

    def chart(title: str, x_label: str, *series: Series) -> Lines:
        return Lines(f"{metric} {title}", x_label, series, log_x=True, log_y=True)

    if not law.both:
        line = Series("law", [(c, float(law.predict(c))) for c in flops], "dashed", color=1)
        return [chart("against compute", "FLOPs", line, dots)]
    sizes = sorted({run.parameters for run in runs})
    chosen = np.unique(np.linspace(0, len(sizes) - 1, MAX_SIZES).round().astype(int))
    tokens = np.geomspace(min(r.tokens for r in runs), max(r.tokens for r in runs) * 2, 40).tolist()
    series = []
    for color, size in enumerate(sizes[i] for i in chosen):
        curve = [(d, float(law.predict(size, d))) for d in tokens]
        mine = [(run.tokens, run.loss) for run in runs if run.parameters == size]
        series.append(Series("", curve, "dashed", color))
        series.append(Series(compact(size), mine, "dots", color))
    over_compute = [dots]
    if min(law.exponents) > 0:
        best = [(c, float(law.predict(*law.optimal_split(c)))) for c in flops]
        over_compute.insert(0, Series("best split", best, "dashed", color=1))
    return [
        chart("by parameters", "tokens", *series),
        chart("against compute", "FLOPs", *over_compute),
    ]
