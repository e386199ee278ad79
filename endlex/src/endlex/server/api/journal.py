"""Routes for journals: bytes in, their hash and the bytes out, and how each session stands."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response, StreamingResponse

from endlex.protocol import (
    CRASHED,
    LOST,
    MAX_BATCH_BYTES,
    MAX_REASON_CHARS,
    SESSION_STATES,
    check_run_id,
    check_session_id,
)
from endlex.server.api.auth import require
from endlex.server.api.bodies import json_response, read_body, read_json
from endlex.server.errors import ApiError
from endlex.server.state import Server, server_of
from endlex.server.store.journals import iter_bytes
from endlex.server.store.queries import find_run, list_sessions
from endlex.server.store.sessions import SessionState, require_session, update_run

router = APIRouter(prefix="/api/v1/runs/{run}")

MOST_BATCHES_AT_ONCE = 64
"""Bodies held in memory together; more wait until one is stored."""
PIECE = 2**20


@router.post("/sessions/{session}/journal", dependencies=[Depends(require("write", creates=True))])
async def append(
    request: Request,
    run: str,
    session: str,
    offset: Annotated[int, Query(ge=0, lt=2**62)],
    crc: Annotated[str, Query(pattern="^[0-9a-fA-F]{8}$")],
) -> Response:
    check_run_id(run)
    check_session_id(session)
    server = server_of(request)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding not in ("identity", "deflate"):
        raise ApiError(415, f"content encoding {encoding!r} is not known: send deflate or none")
    async with request.app.state.batches:
        body = await read_body(request, MAX_BATCH_BYTES)
        reached = await server.ingest.append(
            run, session, offset, int(crc, 16), body, encoding == "deflate"
        )
    return json_response({"offset": reached})


@router.get("/sessions/{session}/journal", dependencies=[Depends(require("read", "write"))])
async def describe(
    request: Request, run: str, session: str, upto: Annotated[int, Query(ge=0)] = 2**62
) -> Response:
    server = server_of(request)

    def hashed() -> dict[str, Any]:
        state = require_session(server.database.reader(), run, session)
        end = min(upto, state.offset)
        return {"offset": state.offset, "sha256": server.hashes.hash(state.pk, end)}

    return json_response(await server.workers.read(hashed))


@router.get("/sessions/{session}/journal/raw", dependencies=[Depends(require("read"))])
async def raw(request: Request, run: str, session: str) -> Response:
    server = server_of(request)
    state = await server.workers.read(
        lambda: require_session(server.database.reader(), run, session)
    )
    name = f'attachment; filename="{session}.jsonl"'
    headers = {"Content-Length": str(state.offset), "Content-Disposition": name}
    return StreamingResponse(
        _stream(server, state), headers=headers, media_type="application/x-ndjson"
    )


async def _stream(server: Server, state: SessionState) -> AsyncIterator[bytes]:
    def piece(start: int) -> bytes:
        end = min(start + PIECE, state.offset)
        return next(iter_bytes(server.database.reader(), state.pk, start, end), b"")

    start = 0
    while start < state.offset:
        content = await server.workers.read(piece, start)
        if not content:
            raise RuntimeError(f"journal of session {state.pk} ends at {start}")
        yield content
        start += len(content)


@router.get("/sessions", dependencies=[Depends(require("read", "write"))])
async def sessions(request: Request, run: str) -> Response:
    server = server_of(request)

    def listed() -> list[dict[str, Any]]:
        connection = server.database.reader()
        return list_sessions(connection, find_run(connection, run))

    return json_response(await server.workers.read(listed))


@router.post("/sessions/{session}/state", dependencies=[Depends(require("write"))])
async def set_state(request: Request, run: str, session: str) -> Response:
    server = server_of(request)
    content = await read_json(request)
    status, unsent = content.get("status"), content.get("unsent_bytes")
    if status not in SESSION_STATES:
        raise ApiError(422, f"status is {status!r}; it is one of {', '.join(SESSION_STATES)}")
    if unsent is not None and (type(unsent) is not int or unsent < 0):
        raise ApiError(422, f"unsent_bytes is {unsent!r}; it must be a whole number from 0")
    reason = content.get("reason")
    reason = reason[:MAX_REASON_CHARS] if isinstance(reason, str) else None
    job = _state_job(server, run, session, status, unsent, reason)
    for kind, event in await server.write(job):
        server.hub.publish(kind, event)
    return json_response({"status": status})


def _state_job(
    server: Server, run: str, session: str, status: str, unsent: int | None, reason: str | None
) -> Callable[[sqlite3.Connection], list[tuple[str, dict[str, Any]]]]:
    def job(connection: sqlite3.Connection) -> list[tuple[str, dict[str, Any]]]:
        state = require_session(connection, run, session)
        # A heartbeat does not take back an end that the journal or the shipper told.
        open_ended = ("running", CRASHED, LOST)
        keep = status in open_ended and state.status not in open_ended
        connection.execute(
            "UPDATE session SET status=?, unsent_bytes=coalesce(?, unsent_bytes), heard=? "
            "WHERE pk=?",
            (state.status if keep else status, unsent, time.time(), state.pk),
        )
        if keep or state.status == status:
            return []
        run_status = update_run(connection, state.run)
        events = [("run", {"run": run, "updated": time.time(), "status": run_status})]
        if state.status == LOST:
            events += server.watch.returned(connection, state.run, run)
        if status == CRASHED:
            events += server.watch.ended(connection, state, run, status, reason)
        return events

    return job
