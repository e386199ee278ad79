"""A run of the database as a file (`endlex.formats`).

Of two points at one step the later one is written. Steps are unique in a metric: those of the
machine's own metrics, seconds since their session began, go on from session to session.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

from endlex.formats import Series, write_run
from endlex.server.store.queries import find_run, show_run
from endlex.server.store.records import Points
from endlex.server.store.series import machine_sessions, read_all_points
from endlex.server.store.texts import Kind, Page, list_records

RECORDS_AT_ONCE = 200


def export_run(
    connection: sqlite3.Connection, run: str, kind: str, file: IO[bytes], wanted: Sequence[str]
) -> None:
    """Write a run as csv, json or parquet.

    Args:
        wanted: names of metrics; all if empty.

    Raises:
        ApiError: 404.
        OSError: the file cannot be written.
    """
    pk = find_run(connection, run)
    texts, tables = (_iter_records(connection, pk, one) for one in ("texts", "tables"))
    series = _iter_series(connection, pk, wanted)
    write_run(file, kind, show_run(connection, run), series, texts, tables)


def export_points(connection: sqlite3.Connection, metric: int) -> Points:
    """Return a metric's points by rising steps; a machine's are seconds since its first point."""
    points = read_all_points(connection, metric)
    if not machine_sessions(connection, metric):
        return points
    order = np.argsort(points.times, kind="stable")
    times, index = points.times[order], np.arange(len(order))
    seconds = np.rint(times - (points.times - points.steps).min()).astype(np.int64)
    steps = np.maximum.accumulate(seconds - index) + index
    return Points(steps, points.numbers[order], times)


def _iter_series(
    connection: sqlite3.Connection, run: int, wanted: Sequence[str]
) -> Iterator[Series]:
    rows = connection.execute("SELECT name, pk FROM metric WHERE run=? ORDER BY name", (run,))
    for name, pk in rows.fetchall():
        if not wanted or name in wanted:
            points = export_points(connection, pk)
            yield name, points.steps.tolist(), points.times.tolist(), points.numbers.tolist()


def _iter_records(connection: sqlite3.Connection, run: int, kind: Kind) -> Iterator[dict[str, Any]]:
    page = Page(limit=RECORDS_AT_ONCE, own=True)
    while records := list_records(connection, kind, run, page):
        yield from records
        page = page.model_copy(update={"before_step": records[-1]["step"]})
