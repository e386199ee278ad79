"""Routes for parts, checkpoints and media: content in, manifests, files out, and what is kept."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any
from urllib.parse import quote

import orjson
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import AfterValidator, BaseModel, Field

from endlex.protocol import MAX_NAME_CHARS, MAX_PARTS_ASKED, REMOVED, Part, check_name, check_sha256
from endlex.server.api.auth import require
from endlex.server.api.bodies import drain, iter_body, json_response, read_body, read_json
from endlex.server.errors import ApiError
from endlex.server.state import Here, Server
from endlex.server.store import retention
from endlex.server.store.checkpoints import STATUS_OF_STATE
from endlex.server.store.runs import find_run, list_checkpoints
from endlex.server.store.texts import find_media

router = APIRouter(prefix="/api/v1")
SEND = [Depends(require("checkpoint"))]
FETCH = [Depends(require("checkpoint", "read"))]
DESTROY = [Depends(require("manage"))]

MOST_MANIFEST_BYTES = 64 * 2**20
PATIENCE = 0.5
"""Seconds that a PUT waits for the verification: small checkpoints need no second request."""
SHOWN = ("image/png", "image/jpeg", "image/gif", "image/webp", "audio/", "video/")
"""Types that a page may show: they hold no scripts."""
BYTES = "application/octet-stream"

Sha256 = Annotated[str, AfterValidator(check_sha256)]


class AskedParts(BaseModel):
    """The parts that a client is about to send."""

    parts: Annotated[list[Sha256], Field(max_length=MAX_PARTS_ASKED)]


@router.post("/parts/missing", dependencies=SEND)
async def missing(request: Request, server: Here) -> Response:
    asked = await read_json(request, AskedParts)
    lacking, partial = await server.file(server.blobs.find_missing, asked.parts)
    return json_response({"missing": lacking, "partial": partial})


@router.put("/parts/{sha256}", dependencies=SEND)
async def put_part(request: Request, server: Here, sha256: str, offset: int = 0) -> Response:
    check_sha256(sha256)
    declared = request.headers.get("content-length", "")
    length = int(declared) if declared.isdecimal() else 0
    body = iter_body(request)
    try:
        new = await server.blobs.receive(sha256, offset, length, body)
    finally:
        await drain(body)
    return json_response({"stored": True}, 201 if new else 200)


@router.put("/runs/{run}/checkpoints/{name}", dependencies=SEND)
async def put_manifest(request: Request, server: Here, run: str, name: str) -> Response:
    body = await read_body(request, MOST_MANIFEST_BYTES)
    try:
        content = await server.file(orjson.loads, body)
    except ValueError as error:
        raise ApiError(400, f"the manifest is not JSON: {error}") from error
    verified = await server.file(server.checkpoints.put, run, name, content)
    if verified is not None:
        await asyncio.wait([asyncio.wrap_future(verified)], timeout=PATIENCE)
    state = await server.ask(server.checkpoints.describe, run, name, whole=False)
    server.hub.publish("checkpoint", {"run": run, "name": name, "state": state["state"]})
    return json_response(state, STATUS_OF_STATE[state["state"]])


@router.get("/runs/{run}/checkpoints", dependencies=FETCH)
async def checkpoints(server: Here, run: str) -> Response:
    return json_response(await server.ask(lambda c: list_checkpoints(c, find_run(c, run))))


@router.get("/runs/{run}/checkpoints/{name}", dependencies=FETCH)
async def describe(server: Here, run: str, name: str) -> Response:
    return json_response(await server.ask(server.checkpoints.describe, run, name))


@router.delete("/runs/{run}/checkpoints/{name}", dependencies=DESTROY)
async def delete(
    server: Here,
    run: str,
    name: str,
    reason: Annotated[str, Query(max_length=MAX_NAME_CHARS)] = "deleted by hand",
) -> Response:
    check_name(reason, "reason")
    await server.write(retention.remove_checkpoint, run, name, reason)
    server.hub.publish("checkpoint", {"run": run, "name": name, "state": REMOVED})
    return json_response({"deleted": name})


@router.api_route(
    "/runs/{run}/checkpoints/{name}/files/{path:path}", methods=["GET", "HEAD"], dependencies=FETCH
)
async def download(request: Request, server: Here, run: str, name: str, path: str) -> Response:
    file = await server.ask(server.checkpoints.find_file, run, name, path)
    disposition = f"attachment; filename*=UTF-8''{quote(path.split('/')[-1])}"
    headers = {"ETag": f'"{file["sha256"]}"', "Content-Disposition": disposition}
    return file_response(request, server, file["parts"], BYTES, headers)


@router.get("/runs/{run}/media/{item}", dependencies=[Depends(require("read"))])
async def media_content(request: Request, server: Here, run: str, item: int) -> Response:
    found = await server.ask(lambda db: find_media(db, find_run(db, run), item))
    parts, mime = found["parts"], found["mime"]
    lacking, _ = await server.file(server.blobs.find_missing, [part["sha256"] for part in parts])
    if lacking:
        raise ApiError(404, "the file is still on its way from the training box")
    shown = mime.startswith(SHOWN)
    headers = {
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Disposition": "inline" if shown else "attachment",
    }
    return file_response(request, server, parts, mime if shown else BYTES, headers)


@router.post("/prune", dependencies=DESTROY)
async def prune(request: Request, server: Here) -> Response:
    asked = await read_json(request, retention.Pruning)
    if not asked.rules and not asked.deleted:
        raise ApiError(422, "no rule says what to keep: give keep_last, keep_best or keep_every")
    answer: dict[str, Any] = {"removed": [], "kept": [], "freed_bytes": 0}
    if asked.rules:
        answer = await server.write(retention.prune, asked)
        for item in () if asked.dry_run else answer["removed"]:
            news = {"run": item["run"], "name": item["name"], "state": REMOVED}
            server.hub.publish("checkpoint", news)
    if asked.deleted:
        about = (time.time() + 1, asked.run, asked.dry_run)
        gone = await server.file(retention.purge_runs, server.database, *about)
        answer["removed"] += [{"run": run, "name": None, "bytes": 0} for run in gone]
    if not asked.dry_run:
        await server.file(retention.collect_parts, server.database, server.blobs)
    return json_response(answer)


SINGLE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
PIECE = 2**20


def file_response(
    request: Request, server: Server, parts: Sequence[Part], mime: str, headers: dict[str, str]
) -> Response:
    """Answer a GET or HEAD with a file, or with what its Range header asks for.

    `headers` are sent along; with an `ETag`, `If-None-Match` and `If-Range` are answered too.
    """
    tag, asked = headers.get("ETag"), request.headers
    if tag and tag in asked.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    size = sum(part["bytes"] for part in parts)
    is_whole = asked.get("if-range", tag) != tag
    wanted = None if is_whole else parse_range(asked.get("range"), size)
    start, end = wanted or (0, size)
    headers |= {"Accept-Ranges": "bytes", "Content-Length": str(end - start)}
    if wanted:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    status = 206 if wanted else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=mime)
    return StreamingResponse(_stream(server, parts, start, end), status, headers, mime)


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Return the first byte that a Range header asks for and the one after the last.

    Several ranges, or another unit, are None, which is all of the file. A range outside the file is
    an `ApiError` 416.
    """
    match = SINGLE.fullmatch(header.strip()) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first and last and int(last) < int(first):
        return None
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if start >= end:
        headers = {"Content-Range": f"bytes */{size}"}
        raise ApiError(416, f"the file has {size:,} bytes: ask for some of them", headers)
    return start, end


async def _stream(
    server: Server, parts: Sequence[Part], first: int, last: int
) -> AsyncIterator[bytes]:
    """Yield the bytes of a file from its parts, a piece at a time."""
    place = 0
    for part in parts:
        start, end = max(place, first), min(place + part["bytes"], last)
        for at in range(start, end, PIECE):
            size = min(PIECE, end - at)
            yield await server.file(server.blobs.read, part["sha256"], at - place, size)
        place += part["bytes"]
