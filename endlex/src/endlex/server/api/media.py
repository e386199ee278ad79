"""Routes for a run's pictures, sound, video and other files: what there are, and their bytes."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse

from endlex.server.api.auth import require
from endlex.server.api.bodies import json_response
from endlex.server.api.checkpoints import stream_parts
from endlex.server.api.ranges import parse_range
from endlex.server.api.runs import AskedPage
from endlex.server.errors import ApiError
from endlex.server.state import server_of
from endlex.server.store.media import find_media, list_media
from endlex.server.store.queries import find_run

router = APIRouter(prefix="/api/v1/runs/{run}/media", dependencies=[Depends(require("read"))])

SHOWN = ("image/png", "image/jpeg", "image/gif", "image/webp", "audio/", "video/")
"""Types that a page may show: they hold no scripts."""


@router.get("")
async def media(request: Request, run: str, page: AskedPage) -> Response:
    found = await server_of(request).ask(lambda c: list_media(c, find_run(c, run), page))
    return json_response({"media": found})


@router.get("/{item}")
async def content(request: Request, run: str, item: int) -> Response:
    server = server_of(request)
    found = await server.ask(lambda c: find_media(c, find_run(c, run), item))
    lacking, _ = await server.workers.file(
        server.blobs.find_missing, [part["sha256"] for part in found["parts"]]
    )
    if lacking:
        raise ApiError(404, "the file is still on its way from the training box")
    wanted = parse_range(request.headers.get("range"), found["bytes"])
    shown = found["mime"].startswith(SHOWN)
    headers = {
        "Content-Length": str(wanted.end - wanted.start),
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
        "Content-Disposition": "inline" if shown else "attachment",
    }
    if wanted.partial:
        place = f"{wanted.start}-{wanted.end - 1}"
        headers["Content-Range"] = f"bytes {place}/{found['bytes']}"
    mime = found["mime"] if shown else "application/octet-stream"
    pieces = stream_parts(server, found["parts"], wanted)
    return StreamingResponse(pieces, 206 if wanted.partial else 200, headers, mime)
