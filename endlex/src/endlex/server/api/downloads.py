"""Files made of parts, whole or in a range of bytes (RFC 9110, section 14)."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from endlex.protocol import Part
from endlex.server.errors import ApiError
from endlex.server.state import Server

SINGLE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
PIECE = 2**20


def file_response(
    request: Request, server: Server, parts: Sequence[Part], mime: str, headers: dict[str, str]
) -> Response:
    """Answer a GET or HEAD with a file, or with what its Range header asks for.

    Args:
        headers: sent along; with an `ETag`, `If-None-Match` and `If-Range` are answered too.

    Raises:
        ApiError: 416, nothing of the range lies in the file.
    """
    tag, asked = headers.get("ETag"), request.headers
    if tag and tag in asked.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    size = sum(part["bytes"] for part in parts)
    whole = asked.get("if-range", tag) != tag
    wanted = None if whole else parse_range(asked.get("range"), size)
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

    Several ranges, or another unit, are None, which is all of the file.

    Raises:
        ApiError: 416, nothing of it lies in the file.
    """
    match = SINGLE.fullmatch(header.strip()) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first and last and int(last) < int(first):
        return None
    if first:
        start, end = int(first), min(size, int(last) + 1 if last else size)
    else:
        start, end = max(0, size - int(last)), size
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
            yield await server.workers.file(server.blobs.read, part["sha256"], at - place, size)
        place += part["bytes"]
