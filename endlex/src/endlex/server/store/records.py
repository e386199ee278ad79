"""Parse a batch of journal lines, what one POST brought, into columns ready to be stored.

Metrics records that carry the same names are gathered into one block, so that ten thousand of them
become three arrays without a look at each value. Only when something in the batch is unusual (a
non-finite value, a damaged line) is every record looked at. A line that is no record is counted
and passed over: it never keeps others from being read.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from endlex import protocol
from endlex.protocol import EndlexError, check_name

MOST_MEDIA_PARTS = 10_000
UNSOUND = (ValueError, TypeError, KeyError, AttributeError, OverflowError, EndlexError)
"""What reading a damaged record raises."""
NAMED = (protocol.TEXT, protocol.TABLE, protocol.MEDIA)
"""Types of records that have a step and a name like a metric's."""

Record = dict[str, Any]
Block = tuple[list[int], list[int], list[float], list[float]]
"""Metrics records with the same names: their positions, steps, times, and values in a row."""


@dataclass(frozen=True)
class Points:
    """Points of one metric: three arrays of one length, or no times where nobody asked for them."""

    steps: NDArray[np.int64]
    numbers: NDArray[np.float64]
    times: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, chosen: slice | NDArray[Any]) -> Points:
        times = self.times[chosen] if len(self.times) else self.times
        return Points(self.steps[chosen], self.numbers[chosen], times)

    @classmethod
    def joined(cls, pieces: Sequence[Points]) -> Points:
        """Return the points of several, one after the other."""
        columns = zip(*((p.steps, p.numbers, p.times) for p in pieces), strict=True)
        return cls(*map(np.concatenate, columns))

    def pack(self) -> tuple[bytes, bytes, bytes]:
        """Return the columns as the database holds them."""
        return self.steps.tobytes(), self.numbers.tobytes(), self.times.tobytes()

    @classmethod
    def unpack(cls, steps: bytes, numbers: bytes, times: bytes = b"") -> Points:
        """Undo `pack`."""
        columns = (np.frombuffer(c, np.float64) for c in (numbers, times))
        return cls(np.frombuffer(steps, np.int64), *columns)


@dataclass
class Batch:
    """What the whole lines of one body say."""

    damaged: int = 0
    points: dict[str, Points] = field(default_factory=dict)
    records: defaultdict[str, list[Record]] = field(default_factory=lambda: defaultdict(list))
    """By type, the records that are not of metrics."""

    @property
    def finish(self) -> Record | None:
        """How the session ended, if a line says so."""
        return self.records[protocol.FINISH][-1] if self.records[protocol.FINISH] else None


def parse_batch(body: bytes) -> Batch:
    """Read whole journal lines; `body` ends with a line end, or is empty."""
    lines = body.split(b"\n")[:-1]
    batch = Batch()
    try:
        _gather(list(map(orjson.loads, lines)), batch)
    except UNSOUND:
        batch = Batch()
        _gather([record for line in lines if (record := _careful(line, batch))], batch)
    return batch


def _gather(records: list[Any], batch: Batch) -> None:
    """Sort records into `batch`; raises one of `UNSOUND` at a damaged one."""
    blocks: defaultdict[tuple[str, ...], Block] = defaultdict(lambda: ([], [], [], []))
    for position, record in enumerate(records):
        if record["type"] == protocol.METRICS:
            values = record["values"]
            positions, steps, times, numbers = blocks[tuple(values)]
            positions.append(position)
            steps.append(record["step"])
            times.append(record["time"])
            numbers.extend(values.values())
        else:
            _check(record)
            batch.records[record["type"]].append(record)
    found: dict[str, list[tuple[list[int], Points]]] = {}
    for names, block in blocks.items():
        for name, points in zip(names, _iter_points(names, *block[1:]), strict=True):
            found.setdefault(name, []).append((block[0], points))
    for name, pieces in found.items():
        places, columns = zip(*pieces, strict=True)
        batch.points[name] = columns[0]
        if len(columns) > 1:  # join them in the order of their lines
            order = np.argsort(np.concatenate(places), kind="stable")
            batch.points[name] = Points.joined(columns)[order]


def _iter_points(
    names: tuple[str, ...], steps: list[int], times: list[float], numbers: list[float]
) -> Iterator[Points]:
    """Yield the points of each name; raises one of `UNSOUND` where one is no number of its kind."""
    for name in names:
        check_name(name, "metric name")
    at = np.frombuffer(array("q", steps), np.int64)
    moments = np.frombuffer(array("d", times), np.float64)
    table = np.frombuffer(array("d", numbers), np.float64).reshape(len(at), len(names))
    if at.min() < 0 or at.max() > protocol.MAX_STEP or not np.isfinite(moments).all():
        raise OverflowError("a step or a time is out of range")
    for column in table.T:
        yield Points(at, np.ascontiguousarray(column), moments)


def _careful(line: bytes, batch: Batch) -> Record | None:
    """Return one line's record with its numbers decoded; None, and counted, when it is none."""
    try:
        record: Record = orjson.loads(line)
        _check(record)
        if record["type"] == protocol.METRICS:
            values = record["values"]
            for name, value in values.items():
                check_name(name, "metric name")
                values[name] = float(protocol.decode_number(value))
    except UNSOUND:
        batch.damaged += 1
        return None
    return record


def _check(record: Record) -> None:
    """Raise at a record that cannot be stored as what it says it is, whatever values it has."""
    kind, sound = record["type"], True
    if not isinstance(kind, str) or not math.isfinite(record["time"]):
        raise EndlexError("not a record")
    step = record["step"] if kind in (protocol.METRICS, protocol.CHECKPOINT, *NAMED) else 0
    if type(step) is not int or not 0 <= step <= protocol.MAX_STEP:
        raise EndlexError("not a step")
    if kind != protocol.METRICS:
        orjson.dumps(record)  # raises at what is nested too deeply to be stored as JSON again
    if kind in NAMED:
        check_name(record["name"], "name")
    if kind == protocol.TEXT:
        sound = isinstance(record["text"], str) and len(record["text"]) <= protocol.MAX_TEXT_CHARS
    elif kind == protocol.TABLE:
        rows = record["rows"]
        sound = all(isinstance(one, list) for one in (record["columns"], rows, *rows))
    elif kind == protocol.CHECKPOINT:
        protocol.check_checkpoint_name(record["name"])
        sound = all(type(file["bytes"]) is int for file in record["files"])
    elif kind == protocol.CONFIG:
        sound = isinstance(record["config"], dict)
    elif kind == protocol.MEDIA:
        sizes = [part["bytes"] for part in record["parts"] if protocol.check_sha256(part["sha256"])]
        sound = len(sizes) <= MOST_MEDIA_PARTS and all(type(n) is int and n > 0 for n in sizes)
        sound = sound and record["bytes"] == sum(sizes)
        sound = sound and isinstance(record["kind"], str) and isinstance(record["mime"], str)
    elif kind == protocol.ALERT:
        check_name(record["title"], "title")
        sound = record["level"] in protocol.LEVELS and isinstance(record["text"], str)
    elif kind == protocol.FINISH:
        sound = record["status"] in protocol.STATUSES
    if not sound:
        raise EndlexError(f"not a record of type {kind}")
