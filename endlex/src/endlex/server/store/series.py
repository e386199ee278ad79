"""Series in chunks: how points of one metric are stored and read.

A series holds the points that one session logged of one metric, in chunks of up to a thousand
points: three packed arrays (steps, numbers, times) a chunk. New points go into the last chunk
while it is short, so a chunk never grows old half empty. A chunk's key is its series' key times
2**20 plus its number: a series lies in one stretch of the table.

A metric's points are the union of its series in the order in which the sessions arrived, and of
two points at one step the later one counts: a resumed run overwrites what it repeats.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from endlex.protocol import SYSTEM
from endlex.server.store.peaks import store_peaks
from endlex.server.store.records import Points

CHUNK_POINTS = 1000
CHUNKS_PER_SERIES = 2**20

EMPTY = Points(np.empty(0, np.int64), np.empty(0), np.empty(0))


@dataclass(frozen=True)
class StepRange:
    """Which steps are wanted; both ends are."""

    first: float = -np.inf
    last: float = np.inf

    @property
    def whole(self) -> bool:
        return self.first == -np.inf and self.last == np.inf


def append_points(
    connection: sqlite3.Connection, metric: int, session: int, points: Points
) -> None:
    """Store points behind those that the session has of the metric."""
    row = connection.execute(
        "SELECT pk, chunks, tail FROM series WHERE metric=? AND session=?", (metric, session)
    ).fetchone()
    if row is None:
        pk = connection.execute(
            "INSERT INTO series (metric, session) VALUES (?, ?)", (metric, session)
        ).lastrowid
        row = (pk, 0, 0)
    pk, chunks, tail = row
    total = len(points.steps)
    start = 0
    if 0 < tail < CHUNK_POINTS:
        start = min(CHUNK_POINTS - tail, total)
        _extend(connection, pk * CHUNKS_PER_SERIES + chunks - 1, _slice(points, 0, start))
        tail += start
    while start < total:
        piece = _slice(points, start, start + CHUNK_POINTS)
        _insert(connection, pk * CHUNKS_PER_SERIES + chunks, piece)
        chunks, tail = chunks + 1, len(piece.steps)
        start += tail
    connection.execute(
        "UPDATE series SET chunks=?, tail=?, count=count+? WHERE pk=?", (chunks, tail, total, pk)
    )


def _slice(points: Points, start: int, stop: int) -> Points:
    return Points(points.steps[start:stop], points.numbers[start:stop], points.times[start:stop])


def _insert(connection: sqlite3.Connection, key: int, points: Points) -> None:
    bounds = (len(points.steps), int(points.steps.min()), int(points.steps.max()))
    content = (points.steps.tobytes(), points.numbers.tobytes(), points.times.tobytes())
    connection.execute(
        "INSERT OR REPLACE INTO chunk VALUES (?, ?, ?, ?, ?, ?, ?)", (key, *bounds, *content)
    )
    store_peaks(connection, key, points)


def _extend(connection: sqlite3.Connection, key: int, piece: Points) -> None:
    row = connection.execute("SELECT steps, numbers, times FROM chunk WHERE pk=?", (key,))
    _insert(connection, key, _join([_unpack(row.fetchone()), piece]))


def _unpack(columns: Sequence[bytes]) -> Points:
    steps, numbers, times = columns
    return Points(
        np.frombuffer(steps, np.int64),
        np.frombuffer(numbers, np.float64),
        np.frombuffer(times, np.float64),
    )


def _join(pieces: list[Points]) -> Points:
    return Points(
        np.concatenate([points.steps for points in pieces]),
        np.concatenate([points.numbers for points in pieces]),
        np.concatenate([points.times for points in pieces]),
    )


def read_points(
    connection: sqlite3.Connection,
    metric: int,
    wanted: StepRange | None = None,
    *,
    times: bool = True,
    session: int | None = None,
) -> Points:
    """Return a metric's points sorted by step, each step once.

    Args:
        metric: the metric's key.
        wanted: chunks wholly outside are not read; points outside are left out.
        times: without them `Points.times` is empty, and a third less is read.
        session: what this one logged alone.
    """
    wanted = wanted or StepRange()
    pieces: list[tuple[bytes, ...]] = []
    for keys in chunk_keys(connection, metric, session):
        pieces += _read_chunks(connection, keys, wanted, times)
    if not pieces:
        return EMPTY
    columns = [b"".join(column) for column in zip(*pieces, strict=True)]
    points = _unpack(columns if times else [*columns, b""])
    return _crop(_one_per_step(points), wanted)


def read_all_points(connection: sqlite3.Connection, metric: int) -> Points:
    """Return a metric's points, those of the machine's own sessions unmixed.

    A trainer's steps go on from session to session. The steps of a session that measures the
    machine are seconds since it began: there, equal steps of two sessions are two points, and the
    sessions follow one another.
    """
    sessions = machine_sessions(connection, metric)
    if not sessions:
        return read_points(connection, metric)
    pieces = [read_points(connection, metric, session=session) for session in sessions]
    return _join(pieces)


def machine_sessions(connection: sqlite3.Connection, metric: int) -> list[int]:
    """Return the sessions that measured the machine and have a metric, in order of arrival."""
    rows = connection.execute(
        "SELECT session.pk FROM series JOIN session ON session.pk = series.session "
        "WHERE series.metric=? AND session.kind=? ORDER BY session.pk",
        (metric, SYSTEM),
    )
    return [pk for (pk,) in rows]


def chunk_keys(
    connection: sqlite3.Connection, metric: int, session: int | None = None
) -> list[tuple[int, int]]:
    """Return for each series of a metric its chunks' first key and the first beyond them."""
    series = connection.execute(
        "SELECT pk FROM series WHERE metric=?1 AND (?2 IS NULL OR session=?2) ORDER BY session",
        (metric, session),
    )
    firsts = [pk * CHUNKS_PER_SERIES for (pk,) in series.fetchall()]
    return [(first, first + CHUNKS_PER_SERIES) for first in firsts]


def _read_chunks(
    connection: sqlite3.Connection, keys: tuple[int, int], wanted: StepRange, times: bool
) -> list[tuple[bytes, ...]]:
    columns = "steps, numbers, times" if times else "steps, numbers"
    query = f"SELECT {columns} FROM chunk WHERE pk >= ? AND pk < ?"
    bounds: list[float] = [*keys]
    if not wanted.whole:
        query += " AND max_step >= ? AND min_step <= ?"
        bounds += [wanted.first, wanted.last]
    return connection.execute(query + " ORDER BY pk", bounds).fetchall()


def _one_per_step(points: Points) -> Points:
    """Sort by step and keep the last of equals; a series in order costs one comparison each."""
    steps = points.steps
    if len(steps) < 2 or bool((steps[1:] > steps[:-1]).all()):
        return points
    order = np.argsort(steps, kind="stable")
    ordered = steps[order]
    last = np.append(ordered[1:] != ordered[:-1], True)
    return _take(points, order[last])


def _take(points: Points, chosen: NDArray[np.intp]) -> Points:
    times = points.times[chosen] if len(points.times) else points.times
    return Points(points.steps[chosen], points.numbers[chosen], times)


def _crop(points: Points, wanted: StepRange) -> Points:
    if wanted.whole or not len(points.steps):
        return points
    start = int(np.searchsorted(points.steps, wanted.first, "left"))
    stop = int(np.searchsorted(points.steps, wanted.last, "right"))
    return _slice(points, start, stop)


def delete_series(connection: sqlite3.Connection, series: int) -> None:
    """Remove a series with its chunks."""
    first = series * CHUNKS_PER_SERIES
    keys = (first, first + CHUNKS_PER_SERIES)
    connection.execute("DELETE FROM chunk WHERE pk >= ? AND pk < ?", keys)
    connection.execute("DELETE FROM peak WHERE pk >= ? AND pk < ?", keys)
    connection.execute("DELETE FROM series WHERE pk=?", (series,))
