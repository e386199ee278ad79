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


@dataclass(frozen=True)
class _Summary:
    """A chunk's key, count and bounds, and its blocks' extremes where it has them."""

    chunk: int
    count: int
    first_step: int
    last_step: int
    first_time: float
    last_time: float
    ordered: int
    content: bytes

    def bounds(self, by_time: bool) -> tuple[float, float]:
        if by_time:
            return self.first_time, self.last_time
        return self.first_step, self.last_step


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
    found: list[_Summary] = []
    for keys in series_ranges:
        rows = connection.execute("SELECT * FROM peak WHERE pk >= ? AND pk < ? ORDER BY pk", keys)
        found += [_Summary(*row) for row in rows.fetchall()]
    # Chunks beyond the range count, too: of points in it, they may be what replaced them.
    if not all(summary.ordered for summary in found) or not _in_sequence(found, by_time):
        return None
    inside = [s for s in found if s.bounds(by_time)[1] >= first and s.bounds(by_time)[0] <= last]
    if sum(summary.count for summary in inside) < 2 * POINTS_PER_PEAK * points:
        return None
    return _draw(connection, inside, by_time, first, last)


def _in_sequence(summaries: list[_Summary], by_time: bool) -> bool:
    """Whether each chunk begins after the one before it: by step, and on a time axis by time."""
    steps = np.array([(s.first_step, s.last_step) for s in summaries], np.int64)
    if not bool((steps[1:, 0] > steps[:-1, 1]).all()):
        return False
    if not by_time:
        return True
    times = np.array([(s.first_time, s.last_time) for s in summaries])
    return bool((times[1:, 0] >= times[:-1, 1]).all())


def _draw(
    connection: sqlite3.Connection,
    summaries: list[_Summary],
    by_time: bool,
    first: float,
    last: float,
) -> Sampled:
    pieces: list[Points] = []
    count = 0
    for number, summary in enumerate(summaries):
        low, high = summary.bounds(by_time)
        inside = first <= low and high <= last
        if inside and summary.content and 0 < number < len(summaries) - 1:
            third = len(summary.content) // 3
            columns = (summary.content[third * i : third * (i + 1)] for i in range(3))
            pieces.append(Points.unpack(*columns))
            count += summary.count
            continue
        query = "SELECT steps, numbers, times FROM chunk WHERE pk=?"
        chunk = Points.unpack(*connection.execute(query, (summary.chunk,)).fetchone())
        x = chunk.times if by_time else chunk.steps
        chunk = chunk[(first <= x) & (x <= last)]
        count += len(chunk)
        if len(chunk):
            pieces.append(_with_ends(chunk))
    points = Points.joined(pieces)
    return Sampled(points.times if by_time else points.steps, points.numbers, count)


def _with_ends(points: Points) -> Points:
    """Return the extremes of each block, the first and last point, and what is not finite."""
    finite = np.isfinite(points.numbers)
    keep = ~finite
    keep[[0, -1]] = True
    usable = np.flatnonzero(finite)
    if len(usable):
        keep[usable[_extremes(points.numbers[usable])]] = True
    return points[keep]
