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
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from endlex.protocol import encode_number
from endlex.server.store.queries import find_run, show_run
from endlex.server.store.records import Points
from endlex.server.store.series import machine_sessions, read_all_points
from endlex.server.store.texts import Kind, Page, list_records

RUN_KEYS = ("run", "project", "name", "status", "created", "tags", "group", "notes", "host")
SESSION_KEYS = ("session", "kind", "rank", "host", "started", "offset", "damaged_lines", "status")
CHECKPOINT_KEYS = ("name", "step", "bytes", "aliases", "metadata")
COLUMNS = ("metric", "step", "time", "value")
POINTS_AT_ONCE = 20_000
RECORDS_AT_ONCE = 200


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


def _iter_metrics(
    connection: sqlite3.Connection, run: int, wanted: Sequence[str]
) -> Iterator[tuple[str, Points]]:
    rows = connection.execute("SELECT name, pk FROM metric WHERE run=? ORDER BY name", (run,))
    for name, pk in rows.fetchall():
        if not wanted or name in wanted:
            yield name, export_points(connection, pk)


def _pieces(points: Points) -> Iterator[Points]:
    """Yield a few points at a time: encoding many at once would keep every thread waiting."""
    for start in range(0, len(points), POINTS_AT_ONCE):
        yield points[start : start + POINTS_AT_ONCE]


def _numbers(values: Iterable[Any]) -> list[Any]:
    return [encode_number(value) for value in values]


def iter_csv(connection: sqlite3.Connection, run: str, wanted: Sequence[str]) -> Iterator[bytes]:
    """Yield a run's CSV in pieces.

    Args:
        wanted: names of metrics; all if empty.
    """
    yield ",".join(COLUMNS).encode() + b"\r\n"
    for name, points in _iter_metrics(connection, find_run(connection, run), wanted):
        for piece in _pieces(points):
            lines = io.StringIO()
            columns = (piece.steps.tolist(), piece.times.tolist(), _numbers(piece.numbers.tolist()))
            csv.writer(lines).writerows(zip(repeat(name), *columns, strict=False))
            yield lines.getvalue().encode()


def iter_json(connection: sqlite3.Connection, run: str, wanted: Sequence[str]) -> Iterator[bytes]:
    """Yield the pieces of one JSON object: the run, its series, texts and tables.

    `endlex export` makes the same of the run's directory, so nothing is in it that only the server
    knows, such as when it last heard of the run.
    """
    whole, pk = show_run(connection, run), find_run(connection, run)
    content = {key: whole[key] for key in (*RUN_KEYS, "config")}
    content["sessions"] = [{key: s[key] for key in SESSION_KEYS} for s in whole["sessions"]]
    content["checkpoints"] = [
        {key: c[key] for key in CHECKPOINT_KEYS} for c in whole["checkpoints"]
    ]
    yield orjson.dumps(content)[:-1] + b',"series":{'
    for number, (name, points) in enumerate(_iter_metrics(connection, pk, wanted)):
        yield (b"," if number else b"") + orjson.dumps(name) + b":{"
        for column in ("step", "time", "value"):
            yield (b"" if column == "step" else b",") + orjson.dumps(column) + b":["
            for place, piece in enumerate(_pieces(points)):
                numbers = {"step": piece.steps, "time": piece.times, "value": piece.numbers}[column]
                encoded = orjson.dumps(_numbers(numbers.tolist()))[1:-1]
                yield (b"," if place else b"") + encoded
            yield b"]"
        yield b"}"
    yield b'},"texts":['
    yield from _iter_records(connection, pk, "texts")
    yield b'],"tables":['
    yield from _iter_records(connection, pk, "tables")
    yield b"]}\n"


def _iter_records(connection: sqlite3.Connection, run: int, kind: Kind) -> Iterator[bytes]:
    page, comma = Page(limit=RECORDS_AT_ONCE, own=True), b""
    while records := list_records(connection, kind, run, page):
        yield comma + b",\n".join(map(orjson.dumps, records))
        page, comma = page.model_copy(update={"before_step": records[-1]["step"]}), b",\n"


def write_parquet(
    connection: sqlite3.Connection, run: str, path: Path, wanted: Sequence[str]
) -> None:
    """Write a run's points as Parquet, a row group per metric."""
    names = pa.dictionary(pa.int32(), pa.string())
    kinds = (names, pa.int64(), pa.float64(), pa.float64())
    about = orjson.dumps(show_run(connection, run)).decode()
    schema = pa.schema(zip(COLUMNS, kinds, strict=True), metadata={"endlex": about})
    with pq.ParquetWriter(path, schema) as writer:
        for name, points in _iter_metrics(connection, find_run(connection, run), wanted):
            same = np.zeros(len(points), np.int32)
            metric = pa.DictionaryArray.from_arrays(same, pa.array([name]))
            columns = [metric, points.steps, points.times, points.numbers]
            writer.write_table(pa.table(columns, schema=schema))


def _write_pieces(iterate: Callable[..., Iterator[bytes]]) -> Callable[..., None]:
    def write(connection: sqlite3.Connection, run: str, path: Path, wanted: Sequence[str]) -> None:
        with path.open("wb") as file:
            file.writelines(iterate(connection, run, wanted))

    return write


WRITERS = {
    "csv": (_write_pieces(iter_csv), "text/csv; charset=utf-8"),
    "json": (_write_pieces(iter_json), "application/json"),
    "parquet": (write_parquet, "application/vnd.apache.parquet"),
}
"""For each format, the function that writes a run to a path, and the type of the file."""
