"""Routes for checkpoints: parts in, manifests, files out, and what is kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any
from urllib.parse import quote

import orjson
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response, StreamingResponse

from endlex.protocol import MAX_NAME_CHARS, MAX_PARTS_ASKED, REMOVED, Part, check_name, check_sha256
from endlex.server.api.auth import require
from endlex.server.api.bodies import drain, iter_body, json_response, read_body, read_json
from endlex.server.api.ranges import ByteRange, parse_range
from endlex.server.errors import ApiError
from endlex.server.state import Server, server_of
from endlex.server.store.checkpoints import STATUS_OF_STATE
from endlex.server.store.queries import find_run, list_checkpoints
from endlex.server.store.retention import (
    Rules,
    collect_parts,
    delete_checkpoints,
    deleted_runs,
    plan_pruning,
    purge_run,
    remove_checkpoints,
)

router = APIRouter(prefix="/api/v1")
SEND = [Depends(require("checkpoint"))]
FETCH = [Depends(require("checkpoint", "read"))]
DESTROY = [Depends(require("manage"))]

MOST_MANIFEST_BYTES = 64 * 2**20
PIECE = 2**20
PATIENCE = 0.5
"""Seconds that a PUT waits for the verification: most are small, and spare a second question."""


@router.post("/parts/missing", dependencies=SEND)
async def missing(request: Request) -> Response:
    asked = (await read_json(request)).get("parts")
    if not isinstance(asked, list) or len(asked) > MAX_PARTS_ASKED:
        raise ApiError(422, f"parts must be a list of at most {MAX_PARTS_ASKED} SHA-256s")
    for sha256 in asked:
        check_sha256(sha256)
    server = server_of(request)
    lacking, partial = await server.workers.file(server.blobs.find_missing, asked)
    return json_response({"missing": lacking, "partial": partial})


@router.put("/parts/{sha256}", dependencies=SEND)
async def put_part(request: Request, sha256: str, offset: int = 0) -> Response:
    check_sha256(sha256)
    server = server_of(request)
    declared = request.headers.get("content-length", "")
    length = int(declared) if declared.isdecimal() else None
    body = iter_body(request)
    try:
        new = await server.blobs.receive(sha256, offset, length, body)
    finally:
        await drain(body)
    return json_response({"stored": True}, 201 if new else 200)


@router.put("/runs/{run}/checkpoints/{name}", dependencies=SEND)
async def put_manifest(request: Request, run: str, name: str) -> Response:
    server = server_of(request)
    body = await read_body(request, MOST_MANIFEST_BYTES)
    try:
        content = await server.workers.file(orjson.loads, body)
    except ValueError as error:
        raise ApiError(400, f"the manifest is not JSON: {error}") from error
    verified = await server.workers.file(server.checkpoints.put, run, name, content)
    if verified is not None:
        await asyncio.wait([asyncio.wrap_future(verified)], timeout=PATIENCE)
    state = await server.workers.read(server.checkpoints.describe, run, name, whole=False)
    server.hub.publish("checkpoint", {"run": run, "name": name, "state": state["state"]})
    return json_response(state, STATUS_OF_STATE[state["state"]])


@router.get("/runs/{run}/checkpoints", dependencies=FETCH)
async def checkpoints(request: Request, run: str) -> Response:
    server = server_of(request)
    return json_response(await server.ask(lambda c: list_checkpoints(c, find_run(c, run))))


@router.get("/runs/{run}/checkpoints/{name}", dependencies=FETCH)
async def describe(request: Request, run: str, name: str) -> Response:
    server = server_of(request)
    return json_response(await server.workers.read(server.checkpoints.describe, run, name))


@router.delete("/runs/{run}/checkpoints/{name}", dependencies=DESTROY)
async def delete(
    request: Request,
    run: str,
    name: str,
    reason: Annotated[str, Query(max_length=MAX_NAME_CHARS)] = "deleted by hand",
) -> Response:
    server = server_of(request)
    check_name(reason, "reason")

    def job(connection: Any) -> None:
        row = connection.execute(
            "SELECT pk, state FROM checkpoint WHERE run=? AND name=? AND state != ?",
            (find_run(connection, run), name, REMOVED),
        ).fetchone()
        if row is None:
            raise ApiError(404, f"checkpoint {name[:120]!r} of run {run!r} is not here")
        if row[1] == "published":
            remove_checkpoints(connection, [row[0]], reason)
        else:
            delete_checkpoints(connection, [row[0]])

    await server.write(job)
    server.hub.publish("checkpoint", {"run": run, "name": name, "state": REMOVED})
    return json_response({"deleted": name})


@router.api_route(
    "/runs/{run}/checkpoints/{name}/files/{path:path}", methods=["GET", "HEAD"], dependencies=FETCH
)
async def download(request: Request, run: str, name: str, path: str) -> Response:
    server = server_of(request)
    file = await server.workers.read(server.checkpoints.find_file, run, name, path)
    tag = f'"{file["sha256"]}"'
    headers = {
        "ETag": tag,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(path.split('/')[-1])}",
    }
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    whole = request.headers.get("if-range", tag) != tag
    wanted = parse_range(None if whole else request.headers.get("range"), file["bytes"])
    headers["Content-Length"] = str(wanted.end - wanted.start)
    if wanted.partial:
        headers["Content-Range"] = f"bytes {wanted.start}-{wanted.end - 1}/{file['bytes']}"
    status = 206 if wanted.partial else 200
    kind = "application/octet-stream"
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=kind)
    return StreamingResponse(stream_parts(server, file["parts"], wanted), status, headers, kind)


async def stream_parts(
    server: Server, parts: Sequence[Part], wanted: ByteRange
) -> AsyncIterator[bytes]:
    """Yield the wanted bytes of a file from its parts, a piece at a time."""
    place = 0
    for part in parts:
        start, end = max(place, wanted.start), min(place + part["bytes"], wanted.end)
        for at in range(start, end, PIECE):
            size = min(PIECE, end - at)
            yield await server.workers.file(_read, server, part["sha256"], at - place, size)
        place += part["bytes"]


def _read(server: Server, sha256: str, start: int, size: int) -> bytes:
    with server.blobs.path(sha256).open("rb") as file:
        file.seek(start)
        content = file.read(size)
    if len(content) != size:
        raise OSError(f"part {sha256} is shorter than it was")
    return content


@router.post("/prune", dependencies=DESTROY)
async def prune(request: Request) -> Response:
    server = server_of(request)
    asked = await read_json(request)
    rules, run, project = _check_rules(asked)
    answer = await server.workers.file(
        _prune,
        server,
        rules,
        run,
        project,
        asked.get("deleted") is True,
        bool(asked.get("dry_run")),
    )
    return json_response(answer)


def _check_rules(asked: dict[str, Any]) -> tuple[Rules, str | None, str | None]:
    for key in ("keep_last", "keep_every"):
        value = asked.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise ApiError(422, f"{key} is {value!r}; it must be a whole number from 1")
    for key in ("keep_best", "run", "project"):
        if not isinstance(asked.get(key), str | None):
            raise ApiError(422, f"{key} is {asked[key]!r}; it must be text")
    if asked.get("mode", "min") not in ("min", "max"):
        raise ApiError(422, f"mode is {asked['mode']!r}: min or max")
    rules = Rules(
        keep_last=asked.get("keep_last"),
        keep_best=asked.get("keep_best"),
        mode=asked.get("mode", "min"),
        keep_every=asked.get("keep_every"),
    )
    if rules.empty and asked.get("deleted") is not True:
        raise ApiError(422, "no rule says what to keep: give keep_last, keep_best or keep_every")
    return rules, asked.get("run"), asked.get("project")


def _prune(
    server: Server, rules: Rules, run: str | None, project: str | None, deleted: bool, dry_run: bool
) -> dict[str, Any]:
    """Remove what the rules do not keep, and deleted runs if asked; both, or look only."""
    answer: dict[str, Any] = {"removed": [], "kept": [], "freed_bytes": 0}
    if not rules.empty:

        def job(connection: Any) -> dict[str, Any]:
            plan = plan_pruning(connection, rules, run, project)
            if not dry_run:
                why = f"pruned by {rules}"
                remove_checkpoints(connection, [c.pk for c in plan.removed], why)
            return {
                "removed": [c.shown() for c in plan.removed],
                "kept": [c.shown() for c in plan.kept],
                "freed_bytes": plan.freed_bytes,
            }

        answer = server.database.write(job).result()
        for item in () if dry_run else answer["removed"]:
            news = {"run": item["run"], "name": item["name"], "state": REMOVED}
            server.hub.publish("checkpoint", news)
    if deleted:
        for pk, run_id in deleted_runs(server.database.reader(), time.time() + 1):
            if run in (None, run_id):
                answer["removed"].append({"run": run_id, "name": None, "bytes": 0})
                if not dry_run:
                    purge_run(server.database, server.hashes, pk)
    if not dry_run:
        collect_parts(server.database, server.blobs)
    return answer
