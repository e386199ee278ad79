"""From a million points to the two thousand that a screen can show, with every spike kept.

Points in order are cut into buckets of equal counts, and of each bucket its lowest and its highest
value stay: a one-point spike is visible at every zoom. Everything is a handful of numpy passes, of
which the long ones run outside the interpreter's lock.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

SAMPLED_DIGITS = 7
"""Significant digits of a sampled series, whose readers zoom in for more: 2,000 points in 50 KB.
Where every point is there, its value is the recorded one."""
X_RESOLUTION = 20_000
"""Into how many steps an axis of times or of numbers is divided at least."""


def choose_points(y: NDArray[np.float64], points: int) -> NDArray[np.intp]:
    """Return the indices of at most `points` values that show the shape of `y`, in order.

    Of each bucket the lowest and highest finite value, and the first and last of all.

    Args:
        y: in the order of its x; may hold NaN and infinities.
        points: at least 4.
    """
    total = len(y)
    if total <= points:
        return np.arange(total)
    buckets = (points - 2) // 2
    width = -(-total // buckets)
    whole = total // width
    finite = np.isfinite(y)
    everything = bool(finite.all())
    found = [np.array([0, total - 1], np.intp)]
    for pick, stand_in in ((np.argmin, np.inf), (np.argmax, -np.inf)):
        usable = y if everything else np.where(finite, y, stand_in)
        body = usable[: whole * width].reshape(whole, width)
        found.append(pick(body, axis=1) + np.arange(whole) * width)
        if whole * width < total:
            found.append(np.array([whole * width + pick(usable[whole * width :])]))
    return np.unique(np.concatenate(found))


def finite_or_none(values: NDArray[np.float64]) -> list[float | None]:
    """Return values as they are; None where one is not finite."""
    return [v if math.isfinite(v) else None for v in values.tolist()]


def round_significant(values: NDArray[np.float64], digits: int) -> list[float | None]:
    """Return values with so many significant digits; None where one is not finite."""
    form = f"%.{digits}g"
    return [float(form % v) if math.isfinite(v) else None for v in values.tolist()]


def round_axis(x: NDArray[np.float64]) -> list[float]:
    """Return x with as many decimals as telling its points apart on a screen needs."""
    if not len(x):
        return []
    span = float(x[-1] - x[0])
    if not span > 0:
        return [float(v) for v in x]
    decimals = max(0, math.ceil(math.log10(X_RESOLUTION / span)))
    if decimals > 12:
        return [float(v) for v in x]
    rounded: list[float] = np.round(x, decimals).tolist()
    return [int(v) for v in rounded] if decimals == 0 else rounded
