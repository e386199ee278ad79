"""Routes for journals: bytes in, their hash and the bytes out, and how each session stands."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, Field

from endlex.protocol import (
    CRASHED,
    LOST,
    MAX_BATCH_BYTES,
    MAX_REASON_CHARS,
    check_run_id,
    check_session_id,
)
from endlex.server.api import ingest
from endlex.server.api.auth import require
from endlex.server.api.bodies import json_response, read_body, read_json
from endlex.server.errors import ApiError
from endlex.server.events import Event
from endlex.server.state import Here, Server
from endlex.server.store.journals import hash_journal, iter_bytes
from endlex.server.store.queries import find_run, list_sessions
from endlex.server.store.sessions import SessionState, require_session, update_run

router = APIRouter(prefix="/api/v1/runs/{run}")
READ_OR_WRITE = [Depends(require("read", "write"))]

MOST_BATCHES_AT_ONCE = 64
"""Bodies held in memory at once; further requests wait until one is stored."""
PIECE = 2**20


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
    check_run_id(run)
    check_session_id(session)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding not in ("identity", "deflate"):
        raise ApiError(415, f"content encoding {encoding!r} is not known: send deflate or none")
    async with request.app.state.batches:
        body = await read_body(request, MAX_BATCH_BYTES)
        reached = await ingest.append(
            server, run, session, offset, int(crc, 16), body, encoding == "deflate"
        )
    return json_response({"offset": reached})


@router.get("/sessions/{session}/journal", dependencies=READ_OR_WRITE)
async def describe(
    server: Here, run: str, session: str, upto: Annotated[int, Query(ge=0)] = 2**62
) -> Response:
    def hashed() -> dict[str, Any]:
        reader = server.database.reader()
        state = require_session(reader, run, session)
        digest = hash_journal(reader, state.pk, min(upto, state.offset))
        return {"offset": state.offset, "sha256": digest}

    return json_response(await server.workers.read(hashed))


@router.get("/sessions/{session}/journal/raw", dependencies=[Depends(require("read"))])
async def raw(server: Here, run: str, session: str) -> Response:
    state = await server.ask(lambda c: require_session(c, run, session))
    name = f'attachment; filename="{session}.jsonl"'
    headers = {"Content-Length": str(state.offset), "Content-Disposition": name}
    return StreamingResponse(_stream(server, state), 200, headers, "application/x-ndjson")


async def _stream(server: Server, state: SessionState) -> AsyncIterator[bytes]:
    def piece(start: int) -> bytes:
        end = min(start + PIECE, state.offset)
        return next(iter_bytes(server.database.reader(), state.pk, start, end))

    start = 0
    while start < state.offset:
        content = await server.workers.read(piece, start)
        yield content
        start += len(content)


@router.get("/sessions", dependencies=READ_OR_WRITE)
async def sessions(server: Here, run: str) -> Response:
    return json_response(await server.ask(lambda c: list_sessions(c, find_run(c, run))))


@router.post("/sessions/{session}/state", dependencies=[Depends(require("write"))])
async def set_state(request: Request, server: Here, run: str, session: str) -> Response:
    report = await read_json(request, StateReport)
    for kind, event in await server.write(lambda c: _set_state(server, c, run, session, report)):
        server.hub.publish(kind, event)
    return json_response({"status": report.status})


def _set_state(
    server: Server, connection: sqlite3.Connection, run: str, session: str, report: StateReport
) -> list[Event]:
    state = require_session(connection, run, session)
    # A heartbeat does not take back an end that the journal or the shipper told.
    open_ended = ("running", CRASHED, LOST)
    keep = report.status in open_ended and state.status not in open_ended
    connection.execute(
        "UPDATE session SET status=?, unsent_bytes=coalesce(?, unsent_bytes), heard=? WHERE pk=?",
        (state.status if keep else report.status, report.unsent_bytes, time.time(), state.pk),
    )
    if keep or state.status == report.status:
        return []
    run_status = update_run(connection, state.run)
    events: list[Event] = [("run", {"run": run, "updated": time.time(), "status": run_status})]
    if state.status == LOST:
        events += server.watch.returned(connection, state.run, run)
    if report.status == CRASHED:
        reason = report.reason and report.reason[:MAX_REASON_CHARS]
        events += server.watch.ended(connection, state, run, report.status, reason)
    return events
