"""Fit a scaling law to a series of runs, and report it: how loss falls with size.

    L(N, D) = E + A / N^alpha + B / D^beta

N is the number of parameters, D of tokens (Hoffmann et al. 2022, section 3.3). If their effects
cannot be separated, the law is E + A / C^alpha over compute. A short series gets one without E.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from archerchat.errors import UsageError
from archerchat.home import Home
from archerchat.model.flops import count_parameters
from archerchat.report.charts import Lines, Series, compact
from archerchat.report.document import Document
from archerchat.report.runs import load_run

Array = NDArray[np.float64]
Parameters = Literal["scaling", "total"]
WITH_FLOOR, BOTH_SIZES = 4, 6
"""Fewest runs for a power law with a floor, and for one of two sizes: one more than unknowns."""
SAME_DIRECTION, DISTINCT = 0.98, 3
"""The effects of two sizes can be separated if they correlate less and have as many values each."""
MAX_SIZES = 6
"""Most sizes that a chart shows; it has as many colours."""
AHEAD = 10.0
"""The law is extrapolated to this multiple of the largest run's compute."""
DELTA = 1e-3
"""Error of the log loss above which Huber's loss is linear."""
START_EXPONENTS, START_FLOORS = (0.15, 0.5), (0.1, 0.5, 0.85)
"""Where the search starts: exponents, and E's shares of the loss."""


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

    @property
    def falls(self) -> bool:
        """Whether loss falls with every size."""
        return min(self.exponents) > 0

    def predict(self, *sizes: Array | float) -> Array:
        """Return the loss at sizes, one argument per term."""
        terms = (
            f / np.asarray(s, dtype=float) ** e
            for f, s, e in zip(self.factors, sizes, self.exponents, strict=True)
        )
        return np.asarray(sum(terms, np.float64(self.floor or 0.0)))

    def predict_run(self, run: SizedRun) -> float:
        return float(self.predict(*((run.parameters, run.tokens) if self.both else (run.flops,))))

    def optimal_split(self, flops: float) -> tuple[float, ...]:
        """Return the N and D with the lowest loss for FLOPs of 6 N D; the FLOPs without them."""
        if not self.both:
            return (flops,)
        (a, b), (alpha, beta) = self.factors, self.exponents
        share = beta / (alpha + beta)
        parameters = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** share
        return parameters, flops / 6 / parameters

    def __str__(self) -> str:
        names = ("N", "D") if self.both else ("C",)
        terms = [] if self.floor is None else [f"{self.floor:.4f}"]
        for factor, name, exponent in zip(self.factors, names, self.exponents, strict=True):
            terms.append(f"{factor:.4g} / {name}^{exponent:.4f}")
        return f"L({', '.join(names)}) = {' + '.join(terms)}"

    @property
    def unknowns(self) -> list[tuple[str, float, list[float]]]:
        """Each unknown of the law: name, value, and its values without one of the runs."""
        names = ("alpha, of parameters", "beta, of tokens") if self.both else ("exponent",)
        laws = [(law.floor, *law.exponents) for law in (self, *self.without_one)]
        columns = zip(("E, the floor", *names), *laws, strict=True)
        return [(name, value, others) for name, value, *others in columns if value is not None]


@np.errstate(over="ignore")  # of a law that falls steeply, the factor may be infinite
def fit_law(losses: Sequence[float], sizes: Sequence[Sequence[float]], floor: bool = True) -> Law:
    """Return the law that is closest to the losses, by Huber's loss of their logarithms.

    Args:
        losses: one per run; positive.
        sizes: for each term of the law, its size in every run; positive.
        floor: whether the law has an E.
    """
    from scipy.optimize import least_squares  # takes half a second

    # Centred, a factor is its term's share of the loss at the middle of the runs. E is a term
    # whose size never changes.
    y, x = np.log(losses), np.log(sizes)
    middle, level, count = x.mean(axis=1), y.mean(), len(x)
    x = np.concatenate([np.zeros((int(floor), len(y))), x - middle[:, None]])
    tight = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-14, "max_nfev": 200}

    def search(runs: NDArray[np.intp], starts: Sequence[Array]) -> Array:
        """Return the height of each term, then each size's exponent."""

        def errors(point: Array) -> Array:
            exponents = np.concatenate([np.zeros(int(floor)), point[-count:]])
            logs = point[:-count, None] - exponents[:, None] * x[:, runs]
            return np.asarray(np.log(np.exp(logs).sum(axis=0)) - (y[runs] - level))

        # The slopes by a complex step, which is exact to the last digit.
        fits = [
            least_squares(errors, start, "cs", loss="huber", f_scale=DELTA, **tight)
            for start in starts
        ]
        return np.asarray(min(fits, key=lambda fit: float(fit.cost)).x)

    def law(point: Array) -> Law:
        heights, exponents = np.split(point, [-count])
        constant = float(np.exp(heights[0] + level)) if floor else None
        factors = np.exp(heights[-count:] + level + exponents * middle)
        return Law(constant, tuple(factors.tolist()), tuple(exponents.tolist()))

    starts = [
        np.array([*np.log([share] * floor + [(1 - share) / count] * count), *exponents])
        for share in (START_FLOORS if floor else (0.0,))
        for exponents in product(START_EXPONENTS, repeat=count)
    ]
    runs = np.arange(len(y))
    best = search(runs, starts)
    others = runs if len(y) > len(best) else ()
    without_one = tuple(law(search(runs[runs != i], [best])) for i in others)
    return replace(law(best), without_one=without_one)


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
        curves = {name: run.metrics.get(name) for name in (metric, "train/tokens", "train/flops")}
        ends = {name: curve[max(curve)] if curve else 0.0 for name, curve in curves.items()}
        absent = [name for name, value in ends.items() if not 0 < value < np.inf]
        if run.model is None or absent:
            absent += [] if run.model else ["the shape of its model"]
            raise UsageError(
                f"run {tag!r} has not logged {', '.join(absent)} (above 0 and finite): leave the "
                "run out or choose another --metric"
            )
        size = getattr(count_parameters(run.model), parameters)
        loss, tokens, flops = ends.values()
        found.append(SizedRun(tag, size, tokens, flops, loss, run.status == "finished"))
    return sorted(found, key=lambda run: run.flops)


def fit_runs(runs: Sequence[SizedRun]) -> tuple[Law, str]:
    """Return the most detailed law that the runs allow, and the reason for it.

    Raises:
        UsageError: all runs took the same compute.
    """
    if len({run.flops for run in runs}) < 2:
        raise UsageError("a law needs runs of two sizes: name at least two, such as d6 d8 d10")
    count, losses = len(runs), [run.loss for run in runs]
    sizes: list[list[float]] = [[run.parameters for run in runs], [run.tokens for run in runs]]
    mixed = _why_inseparable(np.log(sizes))
    if not mixed:
        reason = f"{count} runs whose parameters and tokens vary independently."
        return fit_law(losses, sizes), reason
    if count >= WITH_FLOOR:
        reason = (
            f"The effects of parameters and tokens cannot be separated in these {count} runs, "
            f"because {mixed}, so the law is over compute. To separate them, take at least "
            f"{BOTH_SIZES} runs with at least {DISTINCT} values of each: depths at several "
            "--target-param-data-ratio."
        )
    else:
        reason = (
            f"{count} runs are too few for a floor ({WITH_FLOOR} allow one): this is a plain power "
            "law over compute, which underestimates the loss when extrapolated far."
        )
    return fit_law(losses, [[run.flops for run in runs]], floor=count >= WITH_FLOOR), reason


def _why_inseparable(logs: Array) -> str:
    """Return why the effects of two sizes (2, runs) cannot be separated; "" if they can be."""
    if logs.shape[1] < BOTH_SIZES:
        return "they are too few"
    distinct = min(len(set(np.round(row, 2))) for row in logs)
    if distinct > 1 and np.abs(np.corrcoef(*logs)).min() >= SAME_DIRECTION:
        return "tokens grow with parameters, as in a miniseries at one ratio"
    if distinct < DISTINCT:
        return f"they have only {distinct} different numbers of parameters or of tokens"
    return ""


def build_scaling_report(runs: Sequence[SizedRun], law: Law, reason: str, metric: str) -> Document:
    """Return the document."""
    charts = _charts(runs, law, metric)
    return Document(
        "scaling.md", metric=metric, runs=runs, law=law, reason=reason, charts=charts, ahead=AHEAD
    )


def _charts(runs: Sequence[SizedRun], law: Law, metric: str) -> list[Lines]:
    by_size, by_compute = [], [Series("runs", [(run.flops, run.loss) for run in runs], "dots")]
    if law.falls or not law.both:
        flops = np.geomspace(runs[0].flops, runs[-1].flops * AHEAD, 60).tolist()
        curve = [(c, float(law.predict(*law.optimal_split(c)))) for c in flops]
        by_compute.insert(0, Series("best split" if law.both else "law", curve, "dashed", color=1))
    sizes = sorted({run.parameters for run in runs}) if law.both else []
    shown = sorted({round(i) for i in np.linspace(0, len(sizes) - 1, MAX_SIZES)}) if sizes else []
    for color, size in enumerate(sizes[i] for i in shown):
        least, *_, most = sorted(run.tokens for run in runs)
        tokens = np.geomspace(least, most * 2, 40).tolist()
        curve = [(d, float(law.predict(size, d))) for d in tokens]
        mine = [(run.tokens, run.loss) for run in runs if run.parameters == size]
        by_size.append(Series("", curve, "dashed", color))
        by_size.append(Series(compact(size), mine, "dots", color))
    charts = [
        Lines(f"{metric} by parameters", "tokens", by_size, log_x=True, log_y=True),
        Lines(f"{metric} against compute", "FLOPs", by_compute, log_x=True, log_y=True),
    ]
    return [chart for chart in charts if chart.series]
