"""Series in chunks: how points of one metric are stored and read.

A series holds the points that one session logged of one metric, in chunks of up to a thousand
points: three packed arrays (steps, numbers, times) per chunk. New points go into the last chunk
while it is short, so a chunk never stays half empty. A chunk's key is its series' key times 2**20
plus its number, so the chunks of a series are neighbours in the table.

A metric's points are the union of its series in the order in which the sessions arrived, and of
two points at one step the later one counts: a resumed run overwrites what it repeats.

A chart of a million points needs two thousand. Each chunk has a summary: of every block of fifty
points the lowest and the highest, with their steps and times, a twenty-fifth of the chunk. Where a
chart asks for more points than that, it is drawn from the summaries, and only the chunks at the
ends of its range are read. A spike is an extreme of its block, so it is never lost. A summary
stands for its chunk only while the chunk's points are in order and finite, and chunks follow one
another. Other chunks are read; where chunks overlap (a resumed run that repeats steps, a clock that
jumped) the caller reads all points.
"""

from __future__ import annotations

from sqlite3 import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from endlex.protocol import SYSTEM
from endlex.server.store.records import Points

CHUNK_POINTS = 1000
CHUNKS_PER_SERIES = 2**20


def append_points(db: Connection, metric: int, session: int, points: Points) -> None:
    """Store points behind those that the session has of the metric."""
    pk, chunks, tail = db.execute(
        "INSERT INTO series (metric, session) VALUES (?, ?) "
        "ON CONFLICT (metric, session) DO UPDATE SET metric=metric RETURNING pk, chunks, tail",
        (metric, session),
    ).fetchone()
    first, total = pk * CHUNKS_PER_SERIES, len(points)
    if 0 < tail < CHUNK_POINTS:  # the last chunk is written again, with what fits into it
        chunks -= 1
        query = "SELECT steps, numbers, times FROM chunk WHERE pk=?"
        row = db.execute(query, (first + chunks,)).fetchone()
        points = Points.joined([Points.unpack(*row), points])
    for start in range(0, len(points), CHUNK_POINTS):
        piece = points[start : start + CHUNK_POINTS]
        bounds = (len(piece), int(piece.steps.min()), int(piece.steps.max()))
        query = "INSERT OR REPLACE INTO chunk VALUES (?, ?, ?, ?, ?, ?, ?)"
        db.execute(query, (first + chunks, *bounds, *piece.pack()))
        query = "INSERT OR REPLACE INTO peak VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        db.execute(query, (first + chunks, *_summary(piece)))
        chunks, tail = chunks + 1, len(piece)
    db.execute(
        "UPDATE series SET chunks=?, tail=?, count=count+? WHERE pk=?", (chunks, tail, total, pk)
    )


def read_points(
    db: Connection,
    metric: int | None,
    first: float = -np.inf,
    last: float = np.inf,
    *,
    times: bool = True,
    session: int | None = None,
) -> Points:
    """Return a metric's points from step `first` to `last`, sorted by step, each step once.

    There are none where `metric` is None. Without `times` a third less is read, and the points have
    no times; `session` reads only its own.
    """
    columns = "steps, numbers, times" if times else "steps, numbers"
    query = f"SELECT {columns} FROM chunk WHERE pk >= ? AND pk < ?"
    chunks: list[tuple[bytes, ...]] = []
    for keys in chunk_keys(db, metric, session):
        wanted = f"{query} AND max_step >= ? AND min_step <= ? ORDER BY pk"
        chunks += db.execute(wanted, (*keys, first, last)).fetchall()
    if not chunks:
        return Points.unpack(b"", b"")
    points = Points.unpack(*map(b"".join, zip(*chunks, strict=True)))
    steps = points.steps
    if not (steps[1:] > steps[:-1]).all():  # sort, and keep the last of equals
        points = points[len(steps) - 1 - np.unique(steps[::-1], return_index=True)[1]]
    if (first, last) == (-np.inf, np.inf):  # comparing with those would copy the steps
        return points
    return points[slice_between(points.steps, first, last)]


def slice_between(x: NDArray[Any], first: float, last: float) -> slice:
    """Return the slice of ascending values between `first` and `last`."""
    return slice(int(np.searchsorted(x, first, "left")), int(np.searchsorted(x, last, "right")))


def read_all_points(db: Connection, metric: int | None) -> Points:
    """Return a metric's points, without mixing the sessions that measure the machine.

    A trainer's steps continue from session to session. The steps of a session that measures the
    machine are seconds since it began: there, equal steps of two sessions are two points, and the
    sessions follow one another.
    """
    sessions = machine_sessions(db, metric)
    if not sessions:
        return read_points(db, metric)
    return Points.joined([read_points(db, metric, session=one) for one in sessions])


def machine_sessions(db: Connection, metric: int | None) -> list[int]:
    """Return the sessions that measured the machine and have a metric, in order of arrival."""
    rows = db.execute(
        "SELECT session.pk FROM series JOIN session ON session.pk = series.session "
        "WHERE series.metric=? AND session.kind=? ORDER BY session.pk",
        (metric, SYSTEM),
    )
    return [pk for (pk,) in rows]


def chunk_keys(
    db: Connection, metric: int | None, session: int | None = None
) -> list[tuple[int, int]]:
    """Return for each series of a metric its chunks' first key and the first beyond them."""
    series = db.execute(
        "SELECT pk FROM series WHERE metric=?1 AND (?2 IS NULL OR session=?2) ORDER BY session",
        (metric, session),
    )
    return [(pk * CHUNKS_PER_SERIES, (pk + 1) * CHUNKS_PER_SERIES) for (pk,) in series]


def delete_series(db: Connection, series: int) -> None:
    """Remove a series with its chunks."""
    keys = (series * CHUNKS_PER_SERIES, (series + 1) * CHUNKS_PER_SERIES)
    db.execute("DELETE FROM chunk WHERE pk >= ? AND pk < ?", keys)
    db.execute("DELETE FROM peak WHERE pk >= ? AND pk < ?", keys)
    db.execute("DELETE FROM series WHERE pk=?", (series,))


BLOCK = 50
POINTS_PER_PEAK = BLOCK // 2
Shape = tuple[NDArray[Any], NDArray[np.float64], int]
"""Ascending x and y of points that show a curve's shape, and how many points the curve has."""


def _summary(points: Points) -> tuple[Any, ...]:
    """Return what the table `peak` has of a chunk, besides its key."""
    steps, times = points.steps, points.times
    ordered = bool((steps[1:] > steps[:-1]).all() and (times[1:] >= times[:-1]).all())
    content = b""
    if ordered and np.isfinite(points.numbers).all():
        chosen = np.unique(extremes(points.numbers, points.numbers, BLOCK))
        content = b"".join(points[chosen].pack())
    ends = (int(steps[0]), int(steps[-1]), float(times[0]), float(times[-1]))
    return len(steps), *ends, int(ordered), content


def extremes(low: NDArray[np.float64], high: NDArray[np.float64], width: int) -> NDArray[np.intp]:
    """Return where the lowest of `low` and the highest of `high` in each `width` values are."""
    whole = len(low) // width * width
    starts = np.arange(0, whole, width)
    found: list[Any] = [
        low[:whole].reshape(-1, width).argmin(axis=1) + starts,
        high[:whole].reshape(-1, width).argmax(axis=1) + starts,
    ]
    if whole < len(low):
        found.append([whole + low[whole:].argmin(), whole + high[whole:].argmax()])
    return np.concatenate(found)


def read_sampled(
    db: Connection, metric: int | None, by_time: bool, first: float, last: float, wanted: int
) -> Shape | None:
    """Return a range of a metric drawn from summaries, or None where all points must be read.

    `first` and `last` (times or steps) are both in the range. There must be several candidates for
    each of the `wanted` points.
    """
    rows: list[tuple[Any, ...]] = []
    for keys in chunk_keys(db, metric):
        query = "SELECT * FROM peak WHERE pk >= ? AND pk < ? ORDER BY pk"
        rows += db.execute(query, keys).fetchall()
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
    if np.array(counts)[inside].sum() < 2 * POINTS_PER_PEAK * wanted:
        return None
    whole = (first <= low) & (high <= last)
    whole[inside[[0, -1]]] = False  # the first and last point are in no summary

    def draw(at: int) -> tuple[Points, int]:
        """Return points that show a chunk in the range, and how many they stand for."""
        chunk, count, *_, content = rows[at]
        if content and whole[at]:
            third = len(content) // 3
            return Points.unpack(*(content[third * i : third * (i + 1)] for i in range(3))), count
        query = "SELECT steps, numbers, times FROM chunk WHERE pk=?"
        points = Points.unpack(*db.execute(query, (chunk,)).fetchone())
        x = points.times if by_time else points.steps
        points = points[(first <= x) & (x <= last)]
        if not len(points):
            return points, 0
        finite = np.isfinite(points.numbers)
        numbers, at_finite = points.numbers[finite], np.flatnonzero(finite)
        ends, inner = np.array([0, len(points) - 1]), at_finite[extremes(numbers, numbers, BLOCK)]
        shown = np.unique(np.concatenate([ends, np.flatnonzero(~finite), inner]))
        return points[shown], len(points)

    drawn, counted = zip(*map(draw, inside.tolist()), strict=True)
    shape = Points.joined(drawn)
    return shape.times if by_time else shape.steps, shape.numbers, sum(counted)
