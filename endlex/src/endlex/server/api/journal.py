"""Routes for journals: bytes in, their hash and the bytes out, and how each session stands.

A batch is decoded in a thread of its own, then handed to the database's writer. Raw bytes, the
points made of them and the session's new offset are one transaction, so that a kill at any moment
leaves the server with a prefix of the journal, and its charts with exactly that prefix. Bytes below
the acknowledged offset are skipped: sending a batch twice stores it once.
"""

from __future__ import annotations

import math
import shutil
import time
import zlib
from collections.abc import AsyncIterator
from sqlite3 import Connection
from typing import Annotated, Literal, NamedTuple

import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, Field

from endlex import protocol
from endlex.protocol import CHECKPOINT, MAX_BATCH_BYTES
from endlex.server.api.auth import require
from endlex.server.api.bodies import json_response, read_body, read_json
from endlex.server.errors import ApiError, disk_full
from endlex.server.events import Event
from endlex.server.state import Here, Server
from endlex.server.store import sessions
from endlex.server.store.records import Batch, Points, parse_batch
from endlex.server.store.runs import find_run, list_sessions
from endlex.server.store.series import append_points
from endlex.server.store.sessions import SessionState
from endlex.server.store.texts import store_records
from endlex.server.watch.alerts import Book

router = APIRouter(prefix="/api/v1/runs/{run}")
READ_OR_WRITE = [Depends(require("read", "write"))]

MOST_BATCHES_AT_ONCE = 64
"""Bodies held in memory at once; further requests wait until one is stored."""


class StateReport(BaseModel, strict=True):
    """What a shipper says of a session."""

    status: Literal["running", "finished", "failed", "interrupted", "crashed"]
    unsent_bytes: Annotated[int, Field(ge=0)] | None = None
    reason: str | None = None


@router.post("/sessions/{session}/journal", dependencies=[Depends(require("write", creates=True))])
async def append(
    request: Request,
    server: Here,
    run: str,
    session: str,
    offset: Annotated[int, Query(ge=0, lt=2**62)],
    crc: Annotated[str, Query(pattern="^[0-9a-fA-F]{8}$")],
) -> Response:
    protocol.check_run_id(run)
    protocol.check_session_id(session)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding not in ("identity", "deflate"):
        raise ApiError(415, f"content encoding {encoding!r} is not known: send deflate or none")
    async with request.app.state.batches:
        body = await read_body(request, MAX_BATCH_BYTES)
        deflated = encoding == "deflate"
        prepared = await server.batch(_prepare, offset, int(crc, 16), body, deflated)
        try:
            reached, news = await server.write(lambda c: _store(server, c, run, session, prepared))
        except Exception as error:
            if not isinstance(error, ApiError):
                server.watch.doubt()
            raise
    for kind, content in news:
        server.hub.publish(kind, content)
    return json_response({"offset": reached})


@router.get("/sessions/{session}/journal", dependencies=READ_OR_WRITE)
async def describe(
    server: Here, run: str, session: str, upto: Annotated[int, Query(ge=0)] = 2**62
) -> Response:
    return json_response(await server.ask(sessions.hash_journal, run, session, upto))


@router.get("/sessions/{session}/journal/raw", dependencies=[Depends(require("read"))])
async def raw(server: Here, run: str, session: str) -> Response:
    state = await server.ask(sessions.require_session, run, session)
    name = f'attachment; filename="{session}.jsonl"'
    headers = {"Content-Length": str(state.offset), "Content-Disposition": name}
    return StreamingResponse(_stream(server, state), 200, headers, "application/x-ndjson")


async def _stream(server: Server, state: SessionState) -> AsyncIterator[bytes]:
    start = 0
    while start < state.offset:
        content = await server.ask(sessions.read_segment, state.pk, start, state.offset)
        yield content
        start += len(content)


@router.get("/sessions", dependencies=READ_OR_WRITE)
async def list_all(server: Here, run: str) -> Response:
    return json_response(await server.ask(lambda c: list_sessions(c, find_run(c, run))))


@router.post("/sessions/{session}/state", dependencies=[Depends(require("write"))])
async def set_state(request: Request, server: Here, run: str, session: str) -> Response:
    report = await read_json(request, StateReport)
    for kind, event in await server.write(_set_state, run, session, report):
        server.hub.publish(kind, event)
    return json_response({"status": report.status})


def _set_state(db: Connection, run: str, session: str, report: StateReport) -> list[Event]:
    state = sessions.require_session(db, run, session)
    # A heartbeat does not take back an end that the journal or the shipper told.
    open_ended = ("running", protocol.CRASHED, protocol.LOST)
    keep = report.status in open_ended and state.status not in open_ended
    db.execute(
        "UPDATE session SET status=?, unsent_bytes=coalesce(?, unsent_bytes), heard=? WHERE pk=?",
        (state.status if keep else report.status, report.unsent_bytes, time.time(), state.pk),
    )
    if keep or state.status == report.status:
        return []
    book = Book(db, state.run, [sessions.update_run(db, state.run)])
    if state.status == protocol.LOST:
        book.resolve("lost")
    if report.status == protocol.CRASHED:
        reason = report.reason and report.reason[: protocol.MAX_REASON_CHARS]
        book.tell_end(state, protocol.CRASHED, reason)
    return book.events


class Prepared(NamedTuple):
    """A body's bytes from `offset` on, decoded."""

    offset: int
    body: bytes
    data: bytes
    """`body`, compressed."""
    batch: Batch

    @classmethod
    def of(cls, offset: int, body: bytes) -> Prepared:
        return cls(offset, body, zlib.compress(body, sessions.LEVEL), parse_batch(body))


def _prepare(offset: int, crc: int, body: bytes, deflated: bool) -> Prepared:
    if deflated:
        decoder = zlib.decompressobj()
        try:
            body = decoder.decompress(body, MAX_BATCH_BYTES + 1)
        except zlib.error as error:
            raise ApiError(400, f"the body is not zlib data: {error}") from error
        if len(body) <= MAX_BATCH_BYTES and not decoder.eof:
            raise ApiError(400, "the body's zlib data is cut off: send it again")
    if len(body) > MAX_BATCH_BYTES:
        raise ApiError(413, f"a batch has at most {MAX_BATCH_BYTES:,} bytes: send less at once")
    if zlib.crc32(body) != crc:
        raise ApiError(400, f"the body's CRC-32 is {zlib.crc32(body):08x}, not {crc:08x}: resend")
    if body and not body.endswith(b"\n"):
        raise ApiError(400, "the body does not end with a line end: send whole lines")
    return Prepared.of(offset, body)


def _store(
    server: Server, db: Connection, run: str, session: str, prepared: Prepared
) -> tuple[int, list[Event]]:
    """Store what is new in a batch; return the offset up to which the session is here, and news."""
    state = sessions.find_session(db, run, session)
    if prepared.offset > state.offset:
        message = f"session {session} is here up to byte {state.offset}: send from there"
        raise ApiError(409, message, offset=state.offset)
    if known := state.offset - prepared.offset:  # bytes below were acknowledged before
        body = prepared.body[known:]
        if body and prepared.body[known - 1 : known] != b"\n":
            raise ApiError(
                422,
                f"byte {state.offset} is in the middle of a line, though the server ended one "
                "there: the journal was changed after it was sent; start a new session",
            )
        prepared = Prepared.of(state.offset, body)
    if not prepared.body:
        return state.offset, []
    # Telemetry may use most of what uploads must leave: it is small, and worth more.
    room = server.settings.reserve(server.data.root) // 4 + len(prepared.body)
    if shutil.disk_usage(server.data.root).free < room:
        raise disk_full()
    if state.pk == 0:
        first = prepared.body[: prepared.body.index(b"\n")]
        state = sessions.begin_session(db, run, session, first)
    batch, reached = prepared.batch, state.offset + len(prepared.body)
    sessions.append_segment(db, state.pk, state.offset, prepared.body, prepared.data)
    for name, points in batch.points.items():
        append_points(db, _update_metric(db, state.run, name, points), state.pk, points)
    store_records(db, state.run, batch.records)
    sessions.advance_session(db, state, reached, batch)
    alerts = server.watch.observe(db, state, batch)
    return reached, [sessions.update_run(db, state.run), *_news(run, batch), *alerts]


def _update_metric(db: Connection, run: int, name: str, points: Points) -> int:
    """Count new points into the metric's summary and return its key."""
    last, step = float(points.numbers[-1]), int(points.steps[-1])
    finite = points.numbers[np.isfinite(points.numbers)]
    bounds = (float(finite.min()), float(finite.max())) if len(finite) else (None, None)
    text = None if math.isfinite(last) else protocol.encode_number(last)
    pk: int = db.execute(
        "INSERT INTO metric (run, name, count, last, last_text, last_step, min, max) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (run, name) DO UPDATE SET "
        "count=count+excluded.count, last=excluded.last, last_text=excluded.last_text, "
        "last_step=excluded.last_step, "
        "min=coalesce(min(min, excluded.min), min, excluded.min), "
        "max=coalesce(max(max, excluded.max), max, excluded.max) RETURNING pk",
        (run, name, len(points), None if text else last, text, step, *bounds),
    ).fetchone()[0]
    return pk


def _news(run: str, batch: Batch) -> list[Event]:
    news: list[Event] = []
    if batch.points:
        last = max(int(points.steps[-1]) for points in batch.points.values())
        news.append(("metrics", {"run": run, "metrics": list(batch.points), "last_step": last}))
    for kind in (protocol.TEXT, protocol.MEDIA):
        for name, record in {record["name"]: record for record in batch.records[kind]}.items():
            news.append((kind, {"run": run, "name": name, "step": record["step"]}))
    for record in batch.records[CHECKPOINT]:
        news.append((CHECKPOINT, {"run": run, "name": record["name"], "state": "announced"}))
    return news
