"""From a batch of journal lines to columns: what one POST brought, ready to be stored.

Metrics records that carry the same names are gathered into one block, so that ten thousand of them
become three arrays without a look at each value. Only when something in the batch is unusual (a
non-finite value, a damaged line) is every record looked at. A line that is no record is counted
and passed over: it never keeps others from being read.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from endlex.protocol import (
    ALERT,
    CHECKPOINT,
    CONFIG,
    FINISH,
    LEVELS,
    MAX_REASON_CHARS,
    MAX_STEP,
    MAX_TEXT_CHARS,
    MEDIA,
    METRICS,
    PROTOCOL,
    SESSION,
    STATUSES,
    SYSTEM,
    TABLE,
    TEXT,
    TRAINER,
    EndlexError,
    check_checkpoint_name,
    check_name,
    decode_number,
)
from endlex.server.store.media import check_media

Record = dict[str, Any]


@dataclass(frozen=True)
class Points:
    """Points of one metric in the order in which they were logged; three arrays of one length."""

    steps: NDArray[np.int64]
    numbers: NDArray[np.float64]
    times: NDArray[np.float64]


@dataclass
class Batch:
    """What the whole lines of one body say."""

    lines: int = 0
    damaged: int = 0
    points: dict[str, Points] = field(default_factory=dict)
    sessions: list[Record] = field(default_factory=list)
    configs: list[Record] = field(default_factory=list)
    texts: list[Record] = field(default_factory=list)
    tables: list[Record] = field(default_factory=list)
    checkpoints: list[Record] = field(default_factory=list)
    alerts: list[Record] = field(default_factory=list)
    media: list[Record] = field(default_factory=list)
    status: str | None = None
    """How the session ended, when a finish record is among the lines."""
    reason: str | None = None
    """Why it ended, as the finish record says."""
    ended: float | None = None
    """When it did; the writer's clock."""


class _Block:
    """Metrics records with the same names, in columns that grow."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.positions: list[int] = []
        self.steps: list[int] = []
        self.times: list[float] = []
        self.values: list[float] = []

    def columns(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Return steps [n], times [n] and values [n, names].

        Raises:
            TypeError, OverflowError: something is not a number of its kind.
        """
        for name in self.names:
            check_name(name, "metric name")
        steps = np.frombuffer(array("q", self.steps), np.int64)
        times = np.frombuffer(array("d", self.times), np.float64)
        values = np.frombuffer(array("d", self.values), np.float64)
        if len(steps) and (steps.min() < 0 or steps.max() > MAX_STEP):
            raise OverflowError("a step is out of range")
        if not np.isfinite(times).all():
            raise OverflowError("a time is out of range")
        return steps, times, values.reshape(len(steps), len(self.names))


def parse_batch(body: bytes) -> Batch:
    """Read whole journal lines; `body` ends with a line end, or is empty."""
    lines = body.split(b"\n")[:-1]
    batch = Batch(lines=len(lines))
    try:
        records = list(map(orjson.loads, lines))
        _gather(records, batch)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, EndlexError):
        batch = Batch(lines=len(lines))
        _gather([record for line in lines if (record := _careful(line, batch))], batch)
    return batch


def _gather(records: list[Any], batch: Batch) -> None:
    """Sort sound records into `batch`; raises at whatever is not as it must be."""
    blocks: dict[tuple[str, ...], _Block] = {}
    for position, record in enumerate(records):
        if record["type"] == METRICS:
            values = record["values"]
            names = tuple(values)
            block = blocks.get(names)
            if block is None:
                block = blocks[names] = _Block(names)
            block.positions.append(position)
            block.steps.append(record["step"])
            block.times.append(record["time"])
            block.values.extend(values.values())
        else:
            _check_other(record)
            _place(record, batch)
    batch.points = _to_points(list(blocks.values()))


def _place(record: Record, batch: Batch) -> None:
    kind = record["type"]
    places = {SESSION: batch.sessions, TEXT: batch.texts, TABLE: batch.tables}
    places |= {CHECKPOINT: batch.checkpoints, CONFIG: batch.configs, ALERT: batch.alerts}
    places |= {MEDIA: batch.media}
    if kind == FINISH:
        batch.status, batch.ended = record["status"], record["time"]
        reason = record.get("reason")
        batch.reason = reason[:MAX_REASON_CHARS] if isinstance(reason, str) else None
    elif kind in places:
        places[kind].append(record)


def _to_points(blocks: list[_Block]) -> dict[str, Points]:
    found: dict[str, list[tuple[list[int], Points]]] = {}
    for block in blocks:
        steps, times, values = block.columns()
        for column, name in enumerate(block.names):
            points = Points(steps, np.ascontiguousarray(values[:, column]), times)
            found.setdefault(name, []).append((block.positions, points))
    return {name: _in_order(pieces) for name, pieces in found.items()}


def _in_order(pieces: list[tuple[list[int], Points]]) -> Points:
    """Join the points of several blocks in the order of their lines."""
    if len(pieces) == 1:
        return pieces[0][1]
    order = np.argsort(np.concatenate([positions for positions, _ in pieces]), kind="stable")
    return Points(
        np.concatenate([points.steps for _, points in pieces])[order],
        np.concatenate([points.numbers for _, points in pieces])[order],
        np.concatenate([points.times for _, points in pieces])[order],
    )


def _careful(line: bytes, batch: Batch) -> Record | None:
    """Return one line's record with its numbers decoded; None, and counted, when it is none."""
    try:
        record = orjson.loads(line)
        _check_moment(record)
        if record["type"] == METRICS:
            values = record["values"]
            if type(record["step"]) is not int or not 0 <= record["step"] <= MAX_STEP:
                raise EndlexError("not a step")
            for name, value in values.items():
                check_name(name, "metric name")
                values[name] = float(decode_number(value))
        else:
            _check_other(record)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, EndlexError):
        batch.damaged += 1
        return None
    return record  # type: ignore[no-any-return]


def _check_moment(record: Any) -> None:
    if not isinstance(record["type"], str) or not math.isfinite(record["time"]):
        raise EndlexError("not a record")


def _check_other(record: Record) -> None:
    """Raise at a record, not of metrics, that cannot be stored as what it says it is."""
    _check_moment(record)
    kind = record["type"]
    if kind in (TEXT, TABLE, CHECKPOINT, MEDIA):
        if type(record["step"]) is not int or not 0 <= record["step"] <= MAX_STEP:
            raise EndlexError("not a step")
        name = record["name"]
        check_checkpoint_name(name) if kind == CHECKPOINT else check_name(name, "name")
    if kind == TEXT and not (
        isinstance(record["text"], str) and len(record["text"]) <= MAX_TEXT_CHARS
    ):
        raise EndlexError("not a text")
    if kind == TABLE and not (
        isinstance(record["columns"], list)
        and isinstance(record["rows"], list)
        and all(isinstance(row, list) for row in record["rows"])
    ):
        raise EndlexError("not a table")
    if kind == CHECKPOINT and not all(type(f["bytes"]) is int for f in record["files"]):
        raise EndlexError("not a checkpoint")
    if kind == CONFIG and not isinstance(record["config"], dict):
        raise EndlexError("not a configuration")
    if kind == MEDIA:
        check_media(record)
    if kind == ALERT and not (
        record["level"] in LEVELS
        and isinstance(record["text"], str)
        and check_name(record["title"], "title")
    ):
        raise EndlexError("not an alert")
    if kind == FINISH and record["status"] not in STATUSES:
        raise EndlexError("not a status")


def check_session(record: Any, run: str, session: str) -> Record:
    """Return a session's first record, checked against where it was sent.

    Raises:
        EndlexError: it is another's, or not one; the message says what is wrong.
    """
    if not isinstance(record, dict) or record.get("type") != SESSION:
        raise EndlexError("a session's first line must be its session record")
    if record.get("protocol") != PROTOCOL:
        raise EndlexError(
            f"the session speaks protocol {record.get('protocol')!r}, and this server "
            f"{PROTOCOL}: upgrade the older side"
        )
    for key, sent in (("run", run), ("session", session)):
        if record.get(key) != sent:
            raise EndlexError(f"the session record's {key} is {record.get(key)!r}, not {sent!r}")
    check_name(record.get("project", ""), "project")
    check_name(record.get("name", ""), "run name")
    if record.get("kind", TRAINER) not in (TRAINER, SYSTEM):
        raise EndlexError(f"the session's kind is {record.get('kind')!r}: trainer or system")
    if not isinstance(record.get("config") or {}, dict):
        raise EndlexError("the session's config must be an object")
    _check_moment(record)
    return record
