"""Requests' bodies with a bound on memory, and answers as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson
from fastapi import Request
from fastapi.responses import Response

from endlex.server.errors import ApiError

MOST_JSON_BYTES = 2**20
SILENCE_SECONDS = 20.0
"""How long a body may stand still before it is taken for cut."""
DRAINED_BYTES = 64 * 2**20
"""What is read and dropped of a body that was refused: a client that is still sending would see a
broken connection instead of the answer."""


async def iter_body(request: Request) -> AsyncIterator[bytes]:
    """Yield the body as it comes, and give up when nothing does.

    A box that lost its network never ends its requests; without a bound they would add up.

    Raises:
        ApiError: 408, nothing came for `SILENCE_SECONDS`.
    """
    body = request.stream()
    while True:
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                piece = await anext(body, None)
        except TimeoutError as error:
            message = f"nothing came for {SILENCE_SECONDS:.0f} seconds: send the request again"
            raise ApiError(408, message, {"Connection": "close"}) from error
        if piece is None:
            return
        yield piece


async def read_body(request: Request, limit: int) -> bytes:
    """Return the whole body, holding at most `limit` bytes whatever is sent.

    Raises:
        ApiError: 413, it is longer.
    """
    pieces: list[bytes] = []
    size = 0
    declared = request.headers.get("content-length", "0")
    too_long = not declared.isdigit() or int(declared) > limit
    async for piece in iter_body(request):
        size += len(piece)
        too_long = too_long or size > limit
        if too_long:
            pieces.clear()
            if size > DRAINED_BYTES:
                break
        else:
            pieces.append(piece)
    if too_long:
        raise ApiError(
            413,
            f"the body has more than {limit:,} bytes: send less at once",
            {"Connection": "close"},
        )
    return b"".join(pieces)


async def drain(body: AsyncIterator[bytes]) -> None:
    """Read and drop what is left of a body, up to a bound."""
    size = 0
    async for piece in body:
        size += len(piece)
        if size > DRAINED_BYTES:
            return


async def read_json(request: Request, limit: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """Return the body's JSON object.

    Raises:
        ApiError: 400, it is none; 413, it is too long.
    """
    body = await read_body(request, limit)
    try:
        content = orjson.loads(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ApiError(400, f"the body is a JSON {type(content).__name__}, not an object")
    return content


def json_response(
    content: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return `content` as JSON; what is not finite becomes null."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    return Response(body, status, headers, "application/json")
