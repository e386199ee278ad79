"""What a chart asks for: several metrics of a run against steps, time or another metric."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from endlex.protocol import encode_number
from endlex.server.store.downsample import (
    SAMPLED_DIGITS,
    choose_points,
    finite_or_none,
    round_axis,
    round_significant,
)
from endlex.server.store.peaks import Sampled, read_sampled
from endlex.server.store.series import StepRange, chunk_keys, read_all_points, read_points

STEP = "step"
TIME = "time"
MOST_NON_FINITE = 200


@dataclass(frozen=True)
class ChartQuery:
    """One request: `x` is `step`, `time` or a metric's name; the range is of x, both ends in."""

    metrics: tuple[str, ...]
    x: str = STEP
    first: float = -np.inf
    last: float = np.inf
    points: int = 2000


def find_metric(connection: sqlite3.Connection, run: int, name: str) -> int | None:
    """Return a metric's key, or None where the run has none of the name."""
    row = connection.execute("SELECT pk FROM metric WHERE run=? AND name=?", (run, name)).fetchone()
    return row[0] if row else None


def read_chart(connection: sqlite3.Connection, run: int, query: ChartQuery) -> dict[str, Any]:
    """Return for each metric its x and y, downsampled, and what in it is not finite."""
    axis = None
    if query.x not in (STEP, TIME):
        axis = _xy(connection, run, query.x, ChartQuery((query.x,)), None)
    return {name: _read_one(connection, run, name, query, axis) for name in query.metrics}


def _read_one(
    connection: sqlite3.Connection,
    run: int,
    name: str,
    query: ChartQuery,
    axis: tuple[NDArray[Any], NDArray[np.float64]] | None,
) -> dict[str, Any]:
    drawn = _from_peaks(connection, run, name, query)
    x, y = (drawn.x, drawn.y) if drawn else _xy(connection, run, name, query, axis)
    count = drawn.count if drawn else len(y)
    chosen = choose_points(y, query.points)
    sampled = len(chosen) < count
    strange = np.flatnonzero(~np.isfinite(y))[:MOST_NON_FINITE]
    shown_x = x[chosen]
    return {
        "x": shown_x.tolist() if query.x == STEP else round_axis(shown_x.astype(np.float64)),
        "y": round_significant(y[chosen], SAMPLED_DIGITS) if sampled else finite_or_none(y),
        "count": count,
        "sampled": sampled,
        "nonfinite": [[x[i].item(), encode_number(y[i].item())] for i in strange],
    }


def _from_peaks(
    connection: sqlite3.Connection, run: int, name: str, query: ChartQuery
) -> Sampled | None:
    """Return a long series as its summaries have it; None where its points are to be read."""
    metric = find_metric(connection, run, name) if query.x in (STEP, TIME) else None
    if metric is None:
        return None
    keys = chunk_keys(connection, metric)
    by_time = query.x == TIME
    return read_sampled(connection, keys, by_time, query.first, query.last, query.points)


def _xy(
    connection: sqlite3.Connection,
    run: int,
    name: str,
    query: ChartQuery,
    axis: tuple[NDArray[Any], NDArray[np.float64]] | None,
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return every point of a metric in the wanted range, sorted by x."""
    metric = find_metric(connection, run, name)
    if metric is None:
        return np.empty(0), np.empty(0)
    if query.x == STEP:
        points = read_points(connection, metric, StepRange(query.first, query.last), times=False)
        return points.steps, points.numbers
    if query.x == TIME:
        points = read_all_points(connection, metric)
        return _sorted_range(points.times, points.numbers, query)
    points = read_points(connection, metric, times=False)
    if axis is None:
        return points.steps, points.numbers
    return _sorted_range(*_joined(points.steps, points.numbers, axis), query)


def _joined(
    steps: NDArray[np.int64],
    numbers: NDArray[np.float64],
    axis: tuple[NDArray[Any], NDArray[np.float64]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pair y with the x metric's value at the same step; steps without one are left out."""
    axis_steps, axis_numbers = axis
    if not len(axis_steps):
        return np.empty(0), np.empty(0)
    places = np.minimum(np.searchsorted(axis_steps, steps), len(axis_steps) - 1)
    there = (axis_steps[places] == steps) & np.isfinite(axis_numbers[places])
    return axis_numbers[places[there]], numbers[there]


def _sorted_range(
    x: NDArray[np.float64], y: NDArray[np.float64], query: ChartQuery
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if len(x) > 1 and not bool((x[1:] >= x[:-1]).all()):
        order = np.argsort(x, kind="stable")
        x, y = x[order], y[order]
    start = int(np.searchsorted(x, query.first, "left"))
    stop = int(np.searchsorted(x, query.last, "right"))
    return x[start:stop], y[start:stop]
