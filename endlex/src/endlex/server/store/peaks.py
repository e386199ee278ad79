"""The lowest and highest of every fifty points, kept beside the chunks, to draw long series fast.

A chart of a million points needs two thousand. Each chunk has a summary: of every block of fifty
points the lowest and the highest, with their steps and times, a twenty-fifth of the chunk. Where a
chart asks for more points than that, it is drawn from the summaries, and only the chunks at the
ends of its range are read. A spike is an extreme of its block, so it is never lost.

A summary stands for its chunk only while the chunk's points are in order and finite, and chunks
follow one another. Chunks that hold something else are read; where the chunks themselves overlap (a
resumed run that repeats steps, a clock that jumped) the caller reads all points.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from endlex.server.store.records import Points

BLOCK = 50
POINTS_PER_PEAK = BLOCK // 2


@dataclass(frozen=True)
class Sampled:
    """Points that show the shape of `count` ones: x ascending, all that is not finite among y."""

    x: NDArray[np.int64] | NDArray[np.float64]
    y: NDArray[np.float64]
    count: int


def store_peaks(connection: sqlite3.Connection, chunk: int, points: Points) -> None:
    """Store the summary of a chunk, in place of what there was."""
    steps, times = points.steps, points.times
    ordered = bool((steps[1:] > steps[:-1]).all() and (times[1:] >= times[:-1]).all())
    usable = ordered and np.isfinite(points.numbers).all()
    content = b"".join(points[_extremes(points.numbers)].pack()) if usable else b""
    ends = (int(steps[0]), int(steps[-1]), float(times[0]), float(times[-1]))
    connection.execute(
        "INSERT OR REPLACE INTO peak VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (chunk, len(steps), *ends, int(ordered), content),
    )


def _extremes(numbers: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return where the lowest and highest of each block are, in order."""
    total = len(numbers)
    blocks = -(-total // BLOCK)
    padded = np.full(blocks * BLOCK, numbers[-1])
    padded[:total] = numbers
    table = padded.reshape(blocks, BLOCK)
    start = np.arange(blocks) * BLOCK
    chosen = np.concatenate([table.argmin(axis=1) + start, table.argmax(axis=1) + start])
    return np.unique(np.minimum(chosen, total - 1))


def read_sampled(
    connection: sqlite3.Connection,
    series_ranges: list[tuple[int, int]],
    by_time: bool,
    first: float,
    last: float,
    points: int,
) -> Sampled | None:
    """Return a range of a metric drawn from summaries, or None where all points must be read.

    Args:
        series_ranges: for each series of the metric, the first key of its chunks and the first
            beyond, in the order of the sessions.
        by_time: whether x is time, not step.
        first, last: the range of x; both ends are in it.
        points: how many the chart will have; there must be several candidates for each.
    """
    rows: list[tuple[Any, ...]] = []
    for keys in series_ranges:
        query = "SELECT * FROM peak WHERE pk >= ? AND pk < ? ORDER BY pk"
        rows += connection.execute(query, keys).fetchall()
    if not rows:
        return None
    _, counts, first_step, last_step, first_time, last_time, ordered, _ = zip(*rows, strict=True)
    steps, times = np.array([first_step, last_step]), np.array([first_time, last_time])
    # Chunks beyond the range count, too: of points in it, they may be what replaced them.
    follow = (steps[0, 1:] > steps[1, :-1]).all()
    if by_time:
        follow = follow and (times[0, 1:] >= times[1, :-1]).all()
    low, high = times if by_time else steps
    inside = np.flatnonzero((high >= first) & (low <= last))
    if not all(ordered) or not follow:
        return None
    if np.array(counts)[inside].sum() < 2 * POINTS_PER_PEAK * points:
        return None
    whole = (first <= low) & (high <= last)
    whole[inside[[0, -1]]] = False  # the first and last point are in no summary
    drawn = [_draw(connection, rows[at], by_time, first, last, whole[at]) for at in inside]
    shape = Points.joined([piece for piece, _ in drawn])
    count = sum(count for _, count in drawn)
    return Sampled(shape.times if by_time else shape.steps, shape.numbers, count)


def _draw(
    connection: sqlite3.Connection,
    row: tuple[Any, ...],
    by_time: bool,
    first: float,
    last: float,
    whole: bool,
) -> tuple[Points, int]:
    """Return points that show a chunk in the range, and how many they stand for."""
    chunk, count, *_, content = row
    if content and whole:
        third = len(content) // 3
        return Points.unpack(*(content[third * i : third * (i + 1)] for i in range(3))), count
    query = "SELECT steps, numbers, times FROM chunk WHERE pk=?"
    points = Points.unpack(*connection.execute(query, (chunk,)).fetchone())
    x = points.times if by_time else points.steps
    points = points[(first <= x) & (x <= last)]
    return _with_ends(points) if len(points) else points, len(points)


def _with_ends(points: Points) -> Points:
    """Return the extremes of each block, the first and last point, and what is not finite."""
    finite = np.isfinite(points.numbers)
    keep = ~finite
    keep[[0, -1]] = True
    usable = np.flatnonzero(finite)
    if len(usable):
        keep[usable[_extremes(points.numbers[usable])]] = True
    return points[keep]
