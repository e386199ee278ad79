"""Take journal bytes in: checked, parsed, and committed with the offset in one transaction.

A batch is decoded in a thread of its own, then handed to the database's writer. Raw bytes, the
points made of them and the session's new offset are one transaction, so that a kill at any moment
leaves the server with a prefix of the journal, and its charts with exactly that prefix. Bytes below
the acknowledged offset are skipped: sending a batch twice stores it once.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import time
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from endlex.protocol import MAX_BATCH_BYTES, SYSTEM, TRAINER, EndlexError, encode_number
from endlex.server.alerts import Watch
from endlex.server.database import Database
from endlex.server.errors import ApiError, disk_full, is_disk_full
from endlex.server.events import Hub
from endlex.server.journals import append_segment, compress
from endlex.server.records import Batch, Points, Record, check_session, parse_batch
from endlex.server.series import append_points
from endlex.server.settings import DataDir, Settings
from endlex.server.workers import Workers


@dataclass(frozen=True)
class Prepared:
    """A body's bytes from `offset` on, decoded."""

    offset: int
    body: bytes
    data: bytes
    """`body`, compressed."""
    batch: Batch


@dataclass(frozen=True)
class SessionState:
    """What the writer needs to know of a session; `pk` is 0 for one that is not there yet."""

    pk: int
    run: int
    kind: str
    offset: int
    status: str


class Ingest:
    """The way in for journals; one per server."""

    def __init__(
        self,
        settings: Settings,
        data: DataDir,
        database: Database,
        workers: Workers,
        hub: Hub,
        watch: Watch,
    ) -> None:
        self._database, self._workers, self._hub, self._watch = database, workers, hub, watch
        self._data = data
        # Telemetry may use most of what uploads must leave: it is small, and worth more.
        self._reserve = settings.reserve(data.root) // 4

    async def append(
        self, run: str, session: str, offset: int, crc: int, body: bytes, deflated: bool
    ) -> int:
        """Store what is new in `body` and return the offset up to which the session is here.

        Args:
            run, session: checked ids.
            offset: of the body's first byte in the session's file.
            crc: CRC-32 of the body, uncompressed.
            body: whole lines, as they were sent.
            deflated: whether the body is compressed (zlib).

        Raises:
            ApiError: 400, 409, 413, 422 or 507, as the protocol says.
        """
        prepared = await self._workers.batch(_prepare, offset, crc, body, deflated)
        try:
            future = self._database.write(lambda c: self._store(c, run, session, prepared))
            reached, news = await asyncio.wrap_future(future)
        except (sqlite3.Error, OSError) as error:
            self._database.write(lambda _: self._watch.forget())
            if is_disk_full(error):
                raise disk_full() from error
            raise
        for kind, content in news:
            self._hub.publish(kind, content)
        return reached

    def _store(
        self, connection: sqlite3.Connection, run: str, session: str, prepared: Prepared
    ) -> tuple[int, list[tuple[str, dict[str, Any]]]]:
        state = find_session(connection, run, session)
        if prepared.offset > state.offset:
            raise ApiError(
                409,
                f"session {session} is here up to byte {state.offset}: send from there",
                offset=state.offset,
            )
        if prepared.offset < state.offset:
            prepared = _skip(prepared, state.offset)
        if not prepared.body:
            return state.offset, []
        if shutil.disk_usage(self._data.root).free < self._reserve + len(prepared.body):
            raise disk_full()
        if state.pk == 0:
            state = _begin(connection, run, session, prepared)
        reached = state.offset + len(prepared.body)
        append_segment(connection, state.pk, state.offset, prepared.body, prepared.data)
        _store_batch(connection, state, prepared.batch)
        _advance(connection, state, reached, prepared.batch)
        alerts = self._watch.observe(connection, state.run, run, state.kind, prepared.batch)
        status = update_run(connection, state.run)
        return reached, [*_news(run, status, prepared.batch), *alerts]


def _prepare(offset: int, crc: int, body: bytes, deflated: bool) -> Prepared:
    if deflated:
        body = _inflate(body)
    if len(body) > MAX_BATCH_BYTES:
        raise ApiError(413, f"a batch has at most {MAX_BATCH_BYTES:,} bytes: send less at once")
    if zlib.crc32(body) != crc:
        raise ApiError(400, f"the body's CRC-32 is {zlib.crc32(body):08x}, not {crc:08x}: resend")
    if body and not body.endswith(b"\n"):
        raise ApiError(400, "the body does not end with a line end: send whole lines")
    return Prepared(offset, body, compress(body), parse_batch(body))


def _inflate(body: bytes) -> bytes:
    decoder = zlib.decompressobj()
    try:
        plain = decoder.decompress(body, MAX_BATCH_BYTES + 1)
    except zlib.error as error:
        raise ApiError(400, f"the body is not zlib data: {error}") from error
    if len(plain) <= MAX_BATCH_BYTES and not decoder.eof:
        raise ApiError(400, "the body's zlib data is cut off: send it again")
    return plain


def _skip(prepared: Prepared, offset: int) -> Prepared:
    """Drop the bytes below `offset`: they were acknowledged before."""
    known = offset - prepared.offset
    body = prepared.body[known:]
    if body and prepared.body[known - 1 : known] != b"\n":
        raise ApiError(
            422,
            f"byte {offset} is in the middle of a line, though the server ended one there: the "
            "journal was changed after it was sent; start a new session",
        )
    return Prepared(offset, body, compress(body), parse_batch(body))


def find_session(connection: sqlite3.Connection, run: str, session: str) -> SessionState:
    """Return what is known of a session; an unknown one is at offset 0."""
    row = connection.execute(
        "SELECT session.pk, run, kind, offset, session.status FROM session "
        "JOIN run ON run.pk = session.run WHERE run.id=? AND session.id=?",
        (run, session),
    ).fetchone()
    return SessionState(*row) if row else SessionState(0, 0, TRAINER, 0, "running")


def _begin(
    connection: sqlite3.Connection, run: str, session: str, prepared: Prepared
) -> SessionState:
    """Make the rows of a session, and of its run where it is the first."""
    first = prepared.body[: prepared.body.index(b"\n")]
    try:
        record = check_session(orjson.loads(first), run, session)
    except (ValueError, KeyError, TypeError, EndlexError) as error:
        raise ApiError(422, f"cannot begin session {session}: {error}") from error
    now = time.time()
    connection.execute(
        "INSERT OR IGNORE INTO run (id, project, name, group_name, notes, tags, host, created, "
        "updated) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            run,
            record["project"],
            record["name"],
            _text(record.get("group")),
            _text(record.get("notes")),
            orjson.dumps(_tags(record)).decode(),
            _text(record.get("host")),
            record["time"],
            now,
        ),
    )
    run_pk = connection.execute("SELECT pk FROM run WHERE id=?", (run,)).fetchone()[0]
    return _insert_session(connection, run_pk, session, record, now)


def _insert_session(
    connection: sqlite3.Connection, run: int, session: str, record: Record, now: float
) -> SessionState:
    kind = record.get("kind", TRAINER)
    rank, pid = record.get("rank"), record.get("pid")
    pk = connection.execute(
        "INSERT INTO session (run, id, kind, rank, host, pid, config, started, last_seen) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            run,
            session,
            kind,
            rank if type(rank) is int else 0,
            _text(record.get("host")),
            pid if type(pid) is int else None,
            orjson.dumps(record.get("config") or {}).decode(),
            record["time"],
            now,
        ),
    ).lastrowid
    assert pk is not None
    return SessionState(pk, run, kind, 0, "running")


def _text(value: Any) -> str | None:
    return value[:10_000] if isinstance(value, str) else None


def _tags(record: Record) -> list[str]:
    tags = record.get("tags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def _store_batch(connection: sqlite3.Connection, state: SessionState, batch: Batch) -> None:
    for name, points in batch.points.items():
        if len(points.steps):
            append_points(
                connection, _update_metric(connection, state.run, name, points), state.pk, points
            )
    connection.executemany(
        "INSERT INTO text (run, name, step, time, text) VALUES (?, ?, ?, ?, ?)",
        [(state.run, r["name"], r["step"], r["time"], r["text"]) for r in batch.texts],
    )
    connection.executemany(
        "INSERT INTO data_table (run, name, step, time, content) VALUES (?, ?, ?, ?, ?)",
        [
            (
                state.run,
                r["name"],
                r["step"],
                r["time"],
                orjson.dumps({"columns": r["columns"], "rows": r["rows"]}).decode(),
            )
            for r in batch.tables
        ],
    )
    connection.executemany(
        "INSERT OR IGNORE INTO checkpoint (run, name, step, created, state, bytes, aliases, "
        "metadata) VALUES (?, ?, ?, ?, 'announced', ?, ?, ?)",
        [_announced(state.run, record) for record in batch.checkpoints],
    )


def _announced(run: int, record: Record) -> tuple[Any, ...]:
    return (
        run,
        record["name"],
        record["step"],
        record["time"],
        sum(file["bytes"] for file in record["files"]),
        orjson.dumps(record.get("aliases") or []).decode(),
        orjson.dumps(record.get("metadata") or {}).decode(),
    )


def _update_metric(connection: sqlite3.Connection, run: int, name: str, points: Points) -> int:
    """Count new points into the metric's summary and return its key."""
    last = float(points.numbers[-1])
    finite = points.numbers[np.isfinite(points.numbers)]
    lowest = float(finite.min()) if len(finite) else None
    highest = float(finite.max()) if len(finite) else None
    encoded = encode_number(last)
    text = encoded if isinstance(encoded, str) else None
    pk: int = connection.execute(
        "INSERT INTO metric (run, name, count, last, last_text, last_step, min, max) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (run, name) DO UPDATE SET "
        "count=count+excluded.count, last=excluded.last, last_text=excluded.last_text, "
        "last_step=excluded.last_step, "
        "min=coalesce(min(min, excluded.min), min, excluded.min), "
        "max=coalesce(max(max, excluded.max), max, excluded.max) RETURNING pk",
        (
            run,
            name,
            len(points.steps),
            None if text else last,
            text,
            int(points.steps[-1]),
            lowest,
            highest,
        ),
    ).fetchone()[0]
    return pk


def _advance(
    connection: sqlite3.Connection, state: SessionState, reached: int, batch: Batch
) -> None:
    # Bytes from a session that was taken for dead show that it is not.
    status = batch.status or ("running" if state.status == "crashed" else state.status)
    connection.execute(
        "UPDATE session SET offset=?, damaged_lines=damaged_lines+?, last_seen=?, status=? "
        "WHERE pk=?",
        (reached, batch.damaged, time.time(), status, state.pk),
    )


def update_run(connection: sqlite3.Connection, run: int) -> str:
    """Give a run the status of its newest trainer (the lowest rank of the newest), and the time."""
    row = connection.execute(
        "SELECT status FROM session WHERE run=? ORDER BY kind=?, rank=0 DESC, pk DESC LIMIT 1",
        (run, SYSTEM),
    ).fetchone()
    status: str = row[0] if row else "running"
    connection.execute("UPDATE run SET updated=?, status=? WHERE pk=?", (time.time(), status, run))
    return status


def _news(run: str, status: str, batch: Batch) -> list[tuple[str, dict[str, Any]]]:
    news: list[tuple[str, dict[str, Any]]] = [
        ("run", {"run": run, "updated": time.time(), "status": status})
    ]
    points = {name: p for name, p in batch.points.items() if len(p.steps)}
    if points:
        last = max(int(p.steps[-1]) for p in points.values())
        news.append(("metrics", {"run": run, "metrics": list(points), "last_step": last}))
    for name, record in {record["name"]: record for record in batch.texts}.items():
        news.append(("text", {"run": run, "name": name, "step": record["step"]}))
    for record in batch.checkpoints:
        content = {"run": run, "name": record["name"], "state": "announced"}
        news.append(("checkpoint", content))
    return news
