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

from endlex.protocol import MAX_BATCH_BYTES, encode_number
from endlex.server.errors import ApiError, disk_full, is_disk_full
from endlex.server.events import Hub
from endlex.server.settings import DataDir, Settings
from endlex.server.store.database import Database
from endlex.server.store.journals import append_segment, compress
from endlex.server.store.media import store_media
from endlex.server.store.records import Batch, Points, Record, parse_batch
from endlex.server.store.series import append_points
from endlex.server.store.sessions import (
    SessionState,
    advance_session,
    begin_session,
    find_session,
    update_run,
)
from endlex.server.watch.alerts import Watch
from endlex.server.workers import Workers


@dataclass(frozen=True)
class Prepared:
    """A body's bytes from `offset` on, decoded."""

    offset: int
    body: bytes
    data: bytes
    """`body`, compressed."""
    batch: Batch


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
            first = prepared.body[: prepared.body.index(b"\n")]
            state = begin_session(connection, run, session, first)
        reached = state.offset + len(prepared.body)
        append_segment(connection, state.pk, state.offset, prepared.body, prepared.data)
        _store_batch(connection, state, prepared.batch)
        advance_session(connection, state, reached, prepared.batch)
        alerts = self._watch.observe(connection, state, run, prepared.batch)
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
        [(state.run, r["name"], r["step"], r["time"], _table(r)) for r in batch.tables],
    )
    store_media(connection, state.run, batch.media)
    connection.executemany(
        "INSERT OR IGNORE INTO checkpoint (run, name, step, created, state, bytes, aliases, "
        "metadata) VALUES (?, ?, ?, ?, 'announced', ?, ?, ?)",
        [_announced(state.run, record) for record in batch.checkpoints],
    )


def _table(record: Record) -> str:
    return orjson.dumps({"columns": record["columns"], "rows": record["rows"]}).decode()


def _announced(run: int, record: Record) -> tuple[Any, ...]:
    size = sum(file["bytes"] for file in record["files"])
    aliases = orjson.dumps(record.get("aliases") or []).decode()
    metadata = orjson.dumps(record.get("metadata") or {}).decode()
    return run, record["name"], record["step"], record["time"], size, aliases, metadata


def _update_metric(connection: sqlite3.Connection, run: int, name: str, points: Points) -> int:
    """Count new points into the metric's summary and return its key."""
    last, step = float(points.numbers[-1]), int(points.steps[-1])
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
        (run, name, len(points.steps), None if text else last, text, step, lowest, highest),
    ).fetchone()[0]
    return pk


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
    for name, record in {record["name"]: record for record in batch.media}.items():
        news.append(("media", {"run": run, "name": name, "step": record["step"]}))
    for record in batch.checkpoints:
        content = {"run": run, "name": record["name"], "state": "announced"}
        news.append(("checkpoint", content))
    return news
