"""Fit a scaling law: loss against sizes, by Huber loss in log space (Hoffmann et al. 2022, 3.3).

    L(N, D) = E + A / N^alpha + B / D^beta

The logarithm of the law is a log-sum-exp of straight lines, so its derivatives are simple. From a
grid of starts, all at once, the best go on with Gauss-Newton steps whose rows carry Huber's
weights and whose damping is Levenberg and Marquardt's: that ends where the paper's L-BFGS does,
with numpy alone and to many more digits. With one size instead of two, or without E, it is the
same code with fewer terms.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from archerchat.errors import UsageError

DELTA = 1e-3
"""Errors of log loss above it count by their size and no more by their square."""
EXPONENTS = (0.1, 0.25, 0.45, 0.8)
FLOORS = (0.05, 0.3, 0.6, 0.85)
"""Shares of the loss that is E, to start from."""
MOST_STARTS = 40
STEPS = 400

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """What was fitted: floor + sum of factor / size^exponent."""

    floor: float | None
    """E, the loss that no size takes away; None where the law has none."""
    factors: tuple[float, ...]
    exponents: tuple[float, ...]

    def predict(self, *sizes: Array | float) -> Array:
        """Return the loss at sizes, one argument a term."""
        terms = (
            f / np.asarray(s, dtype=float) ** e
            for f, s, e in zip(self.factors, sizes, self.exponents, strict=True)
        )
        return np.asarray(sum(terms, np.float64(self.floor or 0.0)))


def fit_law(losses: Sequence[float], sizes: Sequence[Sequence[float]], floor: bool = True) -> Law:
    """Return the law that is closest to the losses.

    Args:
        losses: positive, one a run.
        sizes: for each term of the law, its size in every run; positive.
        floor: whether the law has an E.

    Raises:
        UsageError: there are fewer runs than unknowns, or a figure is not positive.
    """
    y, x = np.asarray(losses, dtype=float), np.asarray(sizes, dtype=float)
    unknowns = 2 * len(x) + floor
    if len(y) < unknowns:
        raise UsageError(f"{len(y)} runs cannot tell {unknowns} unknowns: give at least {unknowns}")
    if not (np.isfinite(y).all() and np.isfinite(x).all() and (y > 0).all() and (x > 0).all()):
        raise UsageError("losses and sizes must be positive and finite to fit a scaling law")
    # Centred, a factor is its term's share of the loss at the middle of the runs.
    log_x, middle, level = np.log(x), np.log(x).mean(axis=1), np.log(y).mean()
    fitted = _minimize(np.log(y) - level, log_x - middle[:, None], floor)
    k = len(x)
    exponents = fitted[-k:]
    factors = np.exp(fitted[floor : floor + k] + level + exponents * middle)
    return Law(
        float(np.exp(fitted[0] + level)) if floor else None,
        tuple(map(float, factors)),
        tuple(map(float, exponents)),
    )


def _minimize(y: Array, x: Array, floor: bool) -> Array:
    """Return (floor?, k heights, k exponents) with the least Huber loss; x is (k, n), y (n,)."""
    p = _starts(len(x), floor)
    p = p[np.argsort(_objective(p, y, x, floor))[:MOST_STARTS]]
    loss, damping = _objective(p, y, x, floor), np.full(len(p), 1e-2)
    for _ in range(STEPS):
        predicted, slopes = _model(p, x, floor)
        error = predicted - y
        weights = 1 / np.maximum(1.0, np.abs(error) / DELTA)
        normal = np.einsum("sni,sn,snj->sij", slopes, weights, slopes)
        gradient = np.einsum("sni,sn,sn->si", slopes, weights, error)
        scale = np.einsum("sii->si", normal) + 1e-12
        damped = normal + np.einsum("s,si,ij->sij", damping, scale, np.eye(p.shape[1]))
        step = np.linalg.solve(damped, gradient[..., None])[..., 0]
        tried = p - np.clip(step, -2.0, 2.0)
        tried_loss = _objective(tried, y, x, floor)
        better = tried_loss < loss
        p, loss = np.where(better[:, None], tried, p), np.where(better, tried_loss, loss)
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-12, 1e8)
        if (damping == 1e8).all():
            break
    best: Array = p[np.argmin(loss)]
    return best


def _starts(terms: int, floor: bool) -> Array:
    """Return the grid: how the loss is shared among the terms, and their exponents."""
    rows = []
    for share in FLOORS if floor else (0.0,):
        for first in (0.2, 0.5, 0.8) if terms == 2 else (1.0,):
            parts = [(1 - share) * first, (1 - share) * (1 - first)][:terms]
            heights = ([np.log(share)] if floor else []) + [np.log(part) for part in parts]
            rows += [[*heights, *e] for e in itertools.product(EXPONENTS, repeat=terms)]
    return np.array(rows)


def _model(p: Array, x: Array, floor: bool) -> tuple[Array, Array]:
    """Return the log of the law (s, n) and its derivatives by the parameters (s, n, parameters)."""
    k = len(x)
    lines = p[:, floor : floor + k, None] - p[:, -k:, None] * x  # (s, k, n)
    if floor:
        lines = np.concatenate([np.broadcast_to(p[:, :1, None], lines[:, :1].shape), lines], axis=1)
    top = lines.max(axis=1, keepdims=True)
    parts = np.exp(lines - top)
    total = parts.sum(axis=1, keepdims=True)
    shares = parts / total
    slopes = np.concatenate([shares, -shares[:, floor:] * x], axis=1)
    return (top + np.log(total))[:, 0], slopes.transpose(0, 2, 1)


def _objective(p: Array, y: Array, x: Array, floor: bool) -> Array:
    error = np.abs(_model(p, x, floor)[0] - y)
    huber = np.where(error <= DELTA, error**2 / 2, DELTA * (error - DELTA / 2))
    return np.asarray(huber.sum(axis=1))


def leave_one_out(
    losses: Sequence[float], sizes: Sequence[Sequence[float]], floor: bool = True
) -> list[Law]:
    """Return the laws fitted without one of the runs each; empty where too few would be left."""
    if len(losses) - 1 < 2 * len(sizes) + floor:
        return []
    kept = [[j for j in range(len(losses)) if j != i] for i in range(len(losses))]
    return [
        fit_law([losses[j] for j in rows], [[size[j] for j in rows] for size in sizes], floor)
        for rows in kept
    ]


def optimal_split(law: Law, flops: float) -> tuple[float, float]:
    """Return the parameters and tokens of the least loss for FLOPs of 6 N D.

    Args:
        law: one of two terms, parameters and tokens.
    """
    (a, b), (alpha, beta) = law.factors, law.exponents
    parameters = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** (
        beta / (alpha + beta)
    )
    return parameters, flops / 6 / parameters
