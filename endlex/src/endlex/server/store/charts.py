"""What a chart asks for: several metrics of a run against steps, time or another metric.

From a million points to the two thousand that a screen can show, with every spike kept: points in
order are cut into buckets of equal counts, and of each bucket its lowest and its highest value
stay. Everything is a handful of numpy passes, of which the long ones run outside the interpreter's
lock. `log` keeps more of the small x, where a logarithmic axis has its room.
"""

from __future__ import annotations

import math
from itertools import pairwise
from sqlite3 import Connection
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from endlex.protocol import NON_FINITE
from endlex.server.store import series
from endlex.server.store.records import Points
from endlex.server.store.series import read_points, read_sampled

STEP = "step"
TIME = "time"
MOST_RANGES = 200
"""Stretches of NaN, or of an infinity, that are shown apart; beyond that, near ones are joined."""
RANGE_RESOLUTION = 500
LOG_PARTS = (1000, 100, 10, 1)
"""For a logarithmic x: the first thousandth of the points, the first hundredth and so on get equal
shares of what is shown."""
MOST_DECIMALS = 13
LARGEST_EXACT = 2**53
X_RESOLUTION = 20_000
"""Fewest values that an axis of times or numbers can distinguish."""


class ChartQuery(BaseModel, frozen=True, populate_by_name=True):
    """One request: `x` is `step`, `time` or a metric's name; the range is of x, both ends in."""

    metric: Annotated[list[str], Field(max_length=500)]
    x: str = STEP
    first: Annotated[float, Field(alias="from", allow_inf_nan=False)] = -np.inf
    last: Annotated[float, Field(alias="to", allow_inf_nan=False)] = np.inf
    points: Annotated[int, Field(ge=4, le=100_000)] = 2000
    log: bool = False


def find_metric(db: Connection, run: int, name: str) -> int | None:
    """Return a metric's key, or None where the run has none of the name."""
    row = db.execute("SELECT pk FROM metric WHERE run=? AND name=?", (run, name)).fetchone()
    return row[0] if row else None


def read_chart(db: Connection, run: int, query: ChartQuery) -> dict[str, Any]:
    """Return for each metric its x and y, downsampled, and what in it is not finite.

    They are arrays, of which `json_response` makes lists with null for what is not finite.
    """
    axis = None
    if query.x not in (STEP, TIME):
        axis = read_points(db, find_metric(db, run, query.x), times=False)
    return {
        name: _read_one(db, find_metric(db, run, name), query, axis)
        for name in dict.fromkeys(query.metric)
    }


def _read_one(
    db: Connection, metric: int | None, query: ChartQuery, axis: Points | None
) -> dict[str, Any]:
    drawn = None
    if axis is None and not query.log:
        by_time = query.x == TIME
        drawn = read_sampled(db, metric, by_time, query.first, query.last, query.points)
    x, y, count = drawn or _read_whole(db, metric, query, axis)
    chosen = (choose_log_points if query.log else choose_points)(y, query.points)
    sampled = len(chosen) < count
    shown_x = x[chosen]
    return {
        "x": shown_x if query.x == STEP else round_axis(shown_x.astype(np.float64)),
        # A sampled series has fewer digits, so that 2,000 points take 50 KB: readers zoom for more.
        "y": shorten(y[chosen]) if sampled else y,
        "count": count,
        "sampled": sampled,
        "nonfinite": non_finite_ranges(x, y),
    }


def _read_whole(
    db: Connection, metric: int | None, query: ChartQuery, axis: Points | None
) -> series.Shape:
    """Return every point of a metric in the wanted range, sorted by x.

    A point for which the x metric has no value at the same step is left out.
    """
    if query.x == STEP:
        points = read_points(db, metric, query.first, query.last, times=False)
        return points.steps, points.numbers, len(points)
    if axis is None:
        points = series.read_all_points(db, metric)
        x, y = points.times, points.numbers
    else:
        metric = metric if len(axis) else None  # no point has an x
        points = read_points(db, metric, times=False)
        at = np.minimum(np.searchsorted(axis.steps, points.steps), len(axis) - 1)
        same = (axis.steps[at] == points.steps) & np.isfinite(axis.numbers[at])
        x, y = axis.numbers[at[same]], points.numbers[same]
    if not bool((x[1:] >= x[:-1]).all()):
        order = np.argsort(x, kind="stable")
        x, y = x[order], y[order]
    wanted = series.slice_between(x, query.first, query.last)
    return x[wanted], y[wanted], len(x[wanted])


def choose_points(y: NDArray[np.float64], points: int) -> NDArray[np.intp]:
    """Return the indices of at most `points` (4 or more) values that show the shape of `y`.

    In order: of each bucket the lowest and highest finite value, and the first and last of all.
    """
    total = len(y)
    if total <= points:
        return np.arange(total)
    buckets = (points - 2) // 2
    finite, low, high = np.isfinite(y), y, y
    if not finite.all():
        low, high = np.where(finite, y, np.inf), np.where(finite, y, -np.inf)
    inner = series.extremes(low, high, -(-total // buckets))
    return np.unique(np.concatenate([[0, total - 1], inner]))


def choose_log_points(y: NDArray[np.float64], points: int) -> NDArray[np.intp]:
    """Return indices as `choose_points` does, most of them among the first values."""
    total = len(y)
    if total <= points:
        return np.arange(total)
    ends = [0, *(total // part for part in LOG_PARTS)]
    share = max(4, points // len(LOG_PARTS))
    parts = [start + choose_points(y[start:end], share) for start, end in pairwise(ends)]
    return np.concatenate(parts)


def non_finite_ranges(
    x: NDArray[Any], y: NDArray[np.float64]
) -> list[tuple[float | int, float | int, str]]:
    """Return where values are not finite: from which x to which they follow one another, and what.

    x is ascending.
    """
    finite = np.isfinite(y)
    if finite.all():
        return []
    near = (x[-1] - x[0]) / RANGE_RESOLUTION
    found: list[tuple[float | int, float | int, str]] = []
    for kind, value in NON_FINITE.items():
        at = np.flatnonzero(np.isnan(y) if math.isnan(value) else y == value)
        apart = np.diff(at) > 1
        if apart.sum() >= MOST_RANGES:
            apart &= np.diff(x[at]) > near
        breaks = np.flatnonzero(apart)
        first, last = np.append(at[:1], at[breaks + 1]), np.append(at[breaks], at[-1:])
        found += [(x[a].item(), x[b].item(), kind) for a, b in zip(first, last, strict=True)]
    return sorted(found)


def shorten(values: NDArray[np.float64]) -> NDArray[np.floating[Any]]:
    """Return values with about seven digits, as 32-bit floats, where all of them fit."""
    with np.errstate(over="ignore"):
        short = values.astype(np.float32)
    return short if np.array_equal(np.isinf(short), np.isinf(values)) else values


def round_axis(x: NDArray[np.float64]) -> NDArray[Any]:
    """Return x with as many decimals as telling its points apart on a screen needs."""
    span = float(x[-1] - x[0]) if len(x) else 0.0
    decimals = max(0, math.ceil(math.log10(X_RESOLUTION / span))) if span > 0 else MOST_DECIMALS
    if decimals >= MOST_DECIMALS:
        return x
    rounded = np.round(x, decimals)
    small = decimals == 0 and np.abs(rounded).max() < LARGEST_EXACT
    return rounded.astype(np.int64) if small else rounded
