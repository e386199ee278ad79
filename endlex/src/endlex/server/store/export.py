"""A run as a file that others read: CSV, JSON or Parquet.

All points are in it, none downsampled; of two at one step the later. CSV and Parquet have a row per
point: metric, step, time, value. JSON has everything else too that the run's journals say. Steps
are unique in a metric: those of the machine's own metrics, seconds since their session began, go
on from session to session.

CSV and JSON are made a stretch at a time, so a large run does not fill the memory.
"""

from __future__ import annotations

import csv
import io
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from endlex.protocol import encode_number
from endlex.server.store.queries import find_run, show_run
from endlex.server.store.records import Points
from endlex.server.store.series import machine_sessions, read_all_points
from endlex.server.store.texts import Page, list_tables, list_texts

FORMATS = {
    "csv": "text/csv; charset=utf-8",
    "json": "application/json",
    "parquet": "application/vnd.apache.parquet",
    "html": "text/html; charset=utf-8",
}
RUN_KEYS = ("run", "project", "name", "status", "created", "tags", "group", "notes", "host")
SESSION_KEYS = ("session", "kind", "rank", "host", "started", "offset", "damaged_lines", "status")
CHECKPOINT_KEYS = ("name", "step", "bytes", "aliases", "metadata")
COLUMNS = ("metric", "step", "time", "value")
ROWS_AT_ONCE = 20_000
NUMBERS_AT_ONCE = 20_000
RECORDS_AT_ONCE = 200


def export_points(connection: sqlite3.Connection, metric: int) -> Points:
    """Return a metric's points by rising steps; the machine's in seconds since its first one."""
    points = read_all_points(connection, metric)
    if not machine_sessions(connection, metric):
        return points
    order = np.argsort(points.times, kind="stable")
    times, index = points.times[order], np.arange(len(order))
    seconds = np.rint(times - (points.times - points.steps).min()).astype(np.int64)
    steps = np.maximum.accumulate(seconds - index) + index
    return Points(steps, points.numbers[order], times)


def _iter_metrics(
    connection: sqlite3.Connection, run: int, wanted: Sequence[str]
) -> Iterator[tuple[str, Points]]:
    rows = connection.execute("SELECT name, pk FROM metric WHERE run=? ORDER BY name", (run,))
    for name, pk in rows.fetchall():
        if not wanted or name in wanted:
            yield name, export_points(connection, pk)


def iter_csv(
    connection: sqlite3.Connection, run: str, wanted: Sequence[str] = ()
) -> Iterator[bytes]:
    """Yield the lines of a run's CSV.

    Args:
        wanted: names of metrics; all if empty.

    Raises:
        ApiError: 404.
    """
    pk = find_run(connection, run)
    yield ",".join(COLUMNS).encode() + b"\r\n"
    for name, points in _iter_metrics(connection, pk, wanted):
        for start in range(0, len(points.steps), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            steps, times = points.steps[part].tolist(), points.times[part].tolist()
            numbers = map(encode_number, points.numbers[part].tolist())
            lines = io.StringIO()
            rows = zip(repeat(name), steps, times, numbers, strict=False)
            csv.writer(lines).writerows(rows)
            yield lines.getvalue().encode()


def iter_json(connection: sqlite3.Connection, run: str) -> Iterator[bytes]:
    """Yield the pieces of one JSON object: the run, its series, texts and tables.

    `endlex export` makes the same of the run's directory, so nothing is in it that only the server
    knows, such as when it last heard of the run.

    Raises:
        ApiError: 404.
    """
    whole = show_run(connection, run)
    pk = find_run(connection, run)
    content = {key: whole[key] for key in (*RUN_KEYS, "config")}
    content["sessions"] = [{key: s[key] for key in SESSION_KEYS} for s in whole["sessions"]]
    content["checkpoints"] = [
        {key: c[key] for key in CHECKPOINT_KEYS} for c in whole["checkpoints"]
    ]
    yield orjson.dumps(content)[:-1] + b',"series":{'
    for number, (name, points) in enumerate(_iter_metrics(connection, pk, ())):
        yield (b"," if number else b"") + orjson.dumps(name) + b":{"
        yield from _iter_column(b'"step":', points.steps)
        yield from _iter_column(b',"time":', points.times)
        yield from _iter_column(b',"value":', points.numbers)
        yield b"}"
    yield b'},"texts":['
    yield from _joined(_iter_records(connection, pk, list_texts))
    yield b'],"tables":['
    yield from _joined(_iter_records(connection, pk, list_tables))
    yield b"]}\n"


def _iter_column(head: bytes, numbers: NDArray[Any]) -> Iterator[bytes]:
    """Yield a JSON array in pieces: encoding a whole long one would keep every thread waiting."""
    yield head + b"["
    for start in range(0, len(numbers), NUMBERS_AT_ONCE):
        piece = numbers[start : start + NUMBERS_AT_ONCE].tolist()
        comma = b"," if start else b""
        yield comma + orjson.dumps([encode_number(number) for number in piece])[1:-1]
    yield b"]"


def _iter_records(connection: sqlite3.Connection, run: int, read: Any) -> Iterator[dict[str, Any]]:
    before: int | None = None
    while records := read(connection, run, Page(None, before, RECORDS_AT_ONCE)):
        yield from records
        before = records[-1]["step"]


def _joined(records: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    for number, record in enumerate(records):
        yield (b",\n" if number else b"") + orjson.dumps(record)


def write_parquet(
    connection: sqlite3.Connection, run: str, path: Path, wanted: Sequence[str] = ()
) -> None:
    """Write a run's points as Parquet, a row group per metric.

    Raises:
        ApiError: 404.
        OSError: the file cannot be written.
    """
    pk = find_run(connection, run)
    schema = pa.schema(
        [
            ("metric", pa.dictionary(pa.int32(), pa.string())),
            ("step", pa.int64()),
            ("time", pa.float64()),
            ("value", pa.float64()),
        ],
        metadata={"endlex": orjson.dumps(show_run(connection, run)).decode()},
    )
    with pq.ParquetWriter(path, schema) as writer:
        for name, points in _iter_metrics(connection, pk, wanted):
            names = pa.DictionaryArray.from_arrays(
                np.zeros(len(points.steps), np.int32), pa.array([name])
            )
            columns = [names, points.steps, points.times, points.numbers]
            writer.write_table(pa.table(columns, schema=schema))


def temporary_file(directory: Path) -> Path:
    """Return an empty file's path for an export on its way; the caller deletes it."""
    handle, name = tempfile.mkstemp(prefix="export-", dir=directory)
    os.close(handle)
    return Path(name)
