"""Request bodies read with a bound on memory, and answers as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import orjson
from fastapi import Request
from fastapi.responses import Response
from pydantic import TypeAdapter

from endlex.server.errors import ApiError

T = TypeVar("T")

MOST_JSON_BYTES = 2**20
SILENCE_SECONDS = 20.0
"""How long a body may stand still before the connection counts as lost."""
DRAINED_BYTES = 64 * 2**20
"""Most bytes of a refused body that are read, so that a client which is still sending sees the
answer and not a broken connection."""


async def iter_body(request: Request) -> AsyncIterator[bytes]:
    """Yield the body as it comes; silence of `SILENCE_SECONDS` is an `ApiError` 408.

    A box that lost its network never ends its requests; without a bound they would add up.
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
    """Return the whole body; a longer one is an `ApiError` 413.

    At most `limit` bytes are in memory, whatever is sent.
    """
    declared = request.headers.get("content-length", "0")
    body, pieces = iter_body(request), bytearray()
    too_long = not declared.isdigit() or int(declared) > limit
    while not too_long and (piece := await anext(body, None)) is not None:
        pieces += piece
        too_long = len(pieces) > limit
    if too_long:
        pieces.clear()
        await drain(body)
        message = f"the body has more than {limit:,} bytes: send less at once"
        raise ApiError(413, message, {"Connection": "close"})
    return bytes(pieces)


async def drain(body: AsyncIterator[bytes]) -> None:
    """Read and drop what is left of a body, up to a bound."""
    size = 0
    async for piece in body:
        size += len(piece)
        if size > DRAINED_BYTES:
            return


async def read_json(request: Request, kind: type[T]) -> T:
    """Return the body's JSON as a type that pydantic knows, or raise its `ValidationError`."""
    return TypeAdapter(kind).validate_json(await read_body(request, MOST_JSON_BYTES))


def json_response(
    content: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return `content` as JSON; what is not finite becomes null."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    return Response(body, status, headers, "application/json")
