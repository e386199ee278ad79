"""A run as a file that others read: CSV, JSON or Parquet.

All points are in it, none downsampled; of two at one step the later. CSV has a row a step and a
column a metric (the machine's own, whose steps are seconds, in rows of their own, session by
session). JSON has everything else too that the run's journals say. Parquet has a row a point:
metric, step, time, value.

CSV and JSON are made a stretch at a time, so a large run does not fill the memory.
"""

from __future__ import annotations

import csv
import io
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from endlex.protocol import encode_number
from endlex.server.store.queries import find_run, list_metrics, show_run
from endlex.server.store.series import (
    EMPTY,
    StepRange,
    machine_sessions,
    read_all_points,
    read_points,
)
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
ROWS_AT_ONCE = 20_000
NUMBERS_AT_ONCE = 20_000
RECORDS_AT_ONCE = 200


@dataclass(frozen=True)
class _Group:
    """Metrics by name that share their steps: the trainer's, or one session's of the machine."""

    metrics: dict[str, int]
    session: int | None = None


def _groups(connection: sqlite3.Connection, run: int) -> list[_Group]:
    rows = connection.execute("SELECT name, pk FROM metric WHERE run=? ORDER BY name", (run,))
    trainer = _Group({})
    machine: dict[int, _Group] = {}
    for name, pk in rows.fetchall():
        sessions = machine_sessions(connection, pk)
        for session in sessions:
            machine.setdefault(session, _Group({}, session)).metrics[name] = pk
        if not sessions:
            trainer.metrics[name] = pk
    return [trainer, *(machine[session] for session in sorted(machine))]


def iter_csv(connection: sqlite3.Connection, run: str) -> Iterator[bytes]:
    """Yield the lines of a run's CSV.

    Raises:
        ApiError: 404.
    """
    groups = _groups(connection, find_run(connection, run))
    names = list(dict.fromkeys(name for group in groups for name in group.metrics))
    columns = {name: column + 2 for column, name in enumerate(names)}
    yield _csv_line(["step", "time", *names])
    for group in groups:
        for steps, times, found in _iter_rows(connection, group):
            lines = io.StringIO()
            writer = csv.writer(lines)
            for row in range(len(steps)):
                cells: list[Any] = [int(steps[row]), float(times[row]), *[""] * len(names)]
                for name, (numbers, there) in found.items():
                    if there[row]:
                        cells[columns[name]] = encode_number(float(numbers[row]))
                writer.writerow(cells)
            yield lines.getvalue().encode()


def _csv_line(cells: list[Any]) -> bytes:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue().encode()


Column = tuple[NDArray[np.float64], NDArray[np.bool_]]


def _iter_rows(
    connection: sqlite3.Connection, group: _Group
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64], dict[str, Column]]]:
    """Yield stretches of steps with each metric's numbers and where it has them."""
    for stretch in _stretches(connection, group):
        points = {
            name: read_points(connection, metric, stretch, session=group.session)
            for name, metric in group.metrics.items()
        }
        steps = np.unique(np.concatenate([p.steps for p in points.values()]))
        times = np.zeros(len(steps))
        columns: dict[str, Column] = {}
        for name, found in points.items():
            places = np.searchsorted(steps, found.steps)
            numbers, there = np.zeros(len(steps)), np.zeros(len(steps), bool)
            numbers[places], there[places] = found.numbers, True
            times[places] = np.maximum(times[places], found.times)
            columns[name] = (numbers, there)
        yield steps, times, columns


def _stretches(connection: sqlite3.Connection, group: _Group) -> Iterator[StepRange]:
    """Cut the steps of some metrics so that each stretch holds a bounded number of them."""
    longest = EMPTY.steps
    for metric in group.metrics.values():
        steps = read_points(connection, metric, times=False, session=group.session).steps
        longest = steps if len(steps) > len(longest) else longest
    if not len(longest):
        return
    cuts = longest[ROWS_AT_ONCE::ROWS_AT_ONCE].tolist()
    for first, after in pairwise([-np.inf, *cuts, np.inf]):
        yield StepRange(first, after - 1)


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
    for number, metric in enumerate(list_metrics(connection, pk)):
        points = read_all_points(connection, _key(connection, pk, metric["name"]))
        yield (b"," if number else b"") + orjson.dumps(metric["name"]) + b":{"
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


def _key(connection: sqlite3.Connection, run: int, name: str) -> int:
    row = connection.execute("SELECT pk FROM metric WHERE run=? AND name=?", (run, name)).fetchone()
    key: int = row[0]
    return key


def _iter_records(connection: sqlite3.Connection, run: int, read: Any) -> Iterator[dict[str, Any]]:
    before: int | None = None
    while records := read(connection, run, Page(None, before, RECORDS_AT_ONCE)):
        yield from records
        before = records[-1]["step"]


def _joined(records: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    for number, record in enumerate(records):
        yield (b",\n" if number else b"") + orjson.dumps(record)


def write_parquet(connection: sqlite3.Connection, run: str, path: Path) -> None:
    """Write a run's points as Parquet, a row group a metric.

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
        for metric in list_metrics(connection, pk):
            points = read_all_points(connection, _key(connection, pk, metric["name"]))
            names = pa.DictionaryArray.from_arrays(
                np.zeros(len(points.steps), np.int32), pa.array([metric["name"]])
            )
            columns = [names, points.steps, points.times, points.numbers]
            writer.write_table(pa.table(columns, schema=schema))


def temporary_file(directory: Path) -> Path:
    """Return an empty file's path for an export on its way; the caller deletes it."""
    handle, name = tempfile.mkstemp(prefix="export-", dir=directory)
    os.close(handle)
    return Path(name)
