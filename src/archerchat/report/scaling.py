"""Fit a scaling law: loss against sizes, by Huber loss in log space (Hoffmann et al. 2022, 3.3).

    L(N, D) = E + A / N^alpha + B / D^beta

The logarithm of the law is a log-sum-exp of straight lines, so its derivatives are simple. With
one size instead of two, or without E, the same code fits fewer terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from archerchat.errors import UsageError

DELTA = 1e-3
"""Error of log loss from which on Huber's loss is linear."""
START_EXPONENTS = (0.15, 0.5)
START_FLOORS = (0.1, 0.5, 0.85)
"""E's share of the loss at the starts."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """What was fitted: floor + sum of factor / size^exponent."""

    floor: float | None
    """E, the loss that no size takes away; None where the law has none."""
    factors: tuple[float, ...]
    exponents: tuple[float, ...]
    without_one: tuple[Law, ...] = ()
    """Laws fitted without one of the runs each; empty where too few would be left."""

    def predict(self, *sizes: Array | float) -> Array:
        """Return the loss at sizes, one argument per term."""
        terms = (
            f / np.asarray(s, dtype=float) ** e
            for f, s, e in zip(self.factors, sizes, self.exponents, strict=True)
        )
        return np.asarray(sum(terms, np.float64(self.floor or 0.0)))


def fit_law(losses: Sequence[float], sizes: Sequence[Sequence[float]], floor: bool = True) -> Law:
    """Return the law that is closest to the losses.

    Args:
        losses: one per run; positive.
        sizes: for each term of the law, its size in every run; positive.
        floor: whether the law has an E.

    Raises:
        UsageError: there are fewer runs than unknowns, or a figure is not positive.
    """
    y, x = np.asarray(losses, dtype=float), np.asarray(sizes, dtype=float)
    unknowns = 2 * len(x) + floor
    if len(y) < unknowns:
        raise UsageError(f"a law of {unknowns} unknowns needs at least {unknowns} runs: {len(y)}")
    if not (np.isfinite(y).all() and np.isfinite(x).all() and (y > 0).all() and (x > 0).all()):
        raise UsageError("losses and sizes must be positive and finite to fit a scaling law")
    # Centred, a factor is its term's share of the loss at the middle of the runs.
    middle, level = np.log(x).mean(axis=1), np.log(y).mean()
    lines = np.concatenate([np.zeros((int(floor), len(y))), np.log(x) - middle[:, None]])
    terms = len(lines)
    shares = [[e] * floor + [(1 - e) / len(x)] * len(x) for e in START_FLOORS if floor] or [
        [1 / len(x)] * len(x)
    ]
    grid = product(shares, product(START_EXPONENTS, repeat=len(x)))
    starts = [np.array([*np.log(parts), *exponents]) for parts, exponents in grid]
    best = _minimize(np.log(y) - level, lines, starts)

    def law(point: Array, without_one: Sequence[Law] = ()) -> Law:
        exponents = point[terms:]
        factors = np.exp(point[int(floor) : terms] + level + exponents * middle)
        constant = float(np.exp(point[0] + level)) if floor else None
        return Law(constant, tuple(factors.tolist()), tuple(exponents.tolist()), tuple(without_one))

    if len(y) == unknowns:
        return law(best)
    rows = (np.arange(len(y)) != i for i in range(len(y)))
    return law(best, [law(_minimize(np.log(y[r]) - level, lines[:, r], [best])) for r in rows])


def _minimize(target: Array, lines: Array, starts: list[Array]) -> Array:
    """Return the height of each term, then each size's exponent, with the least Huber loss.

    Args:
        target: log losses (runs).
        lines: a term's log size in each run (terms, runs); zeros for E, which has no exponent.
    """
    from scipy.optimize import least_squares  # takes half a second

    terms = len(lines)
    constant = 2 * terms - len(starts[0])

    def logs(point: Array) -> Array:
        exponents = np.concatenate([np.zeros(constant), point[terms:]])
        return point[:terms, None] - exponents[:, None] * lines

    def errors(point: Array) -> Array:
        return np.asarray(np.logaddexp.reduce(logs(point)) - target)

    def slopes(point: Array) -> Array:
        shares = np.exp(logs(point) - np.logaddexp.reduce(logs(point)))
        return np.concatenate([shares, -(shares * lines)[constant:]]).T

    tight = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-14, "max_nfev": 200}
    fits = [
        least_squares(errors, start, slopes, loss="huber", f_scale=DELTA, **tight)
        for start in starts
    ]
    return np.asarray(min(fits, key=lambda fit: float(fit.cost)).x)


def optimal_split(law: Law, flops: float) -> tuple[float, float]:
    """Return the N and D of least loss for FLOPs of 6 N D, by a law of these two terms."""
    (a, b), (alpha, beta) = law.factors, law.exponents
    share = beta / (alpha + beta)
    parameters = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** share
    return parameters, flops / 6 / parameters
