"""What stands before every handler: who may ask, and how long; and the form of every refusal."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from archerchat.errors import ArcherChatError, UsageError
from archerchat.serving.models import UnknownModel
from archerchat.serving.worker import Overloaded

MAX_BODY_BYTES = 8 * 2**20
TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES:,} bytes"
REQUEST_SECONDS = 15.0
RETRY_SECONDS = 1
to_json = json.JSONEncoder(separators=(",", ":")).encode
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """A connection that closes when a request has not arrived whole in `REQUEST_SECONDS`.

    Uvicorn itself waits for ever for the end of a request's headers and of its body. A request gets
    up to twice that time, as the connection is looked at in intervals.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._waiting_for: Any = self
        self.loop.call_later(REQUEST_SECONDS, self._look)

    def _look(self) -> None:
        request = self.cycle
        is_whole = request and not request.more_body and not request.response_complete
        if not is_whole and self._waiting_for is request:
            self.transport.close()
        elif not self.transport.is_closing():
            self._waiting_for = self if is_whole else request
            self.loop.call_later(REQUEST_SECONDS, self._look)


class AsciiJSON(Response):
    """JSON in ASCII, so that half of a surrogate pair in what a client sent harms nobody."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content).encode()


def refusal(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> Response:
    """Return the response to a request that is refused, as OpenAI's API words it."""
    kind = "server_error" if status >= 500 else TYPES.get(status, "invalid_request_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return AsciiJSON(body, status, {"retry-after": str(RETRY_SECONDS)} if status == 429 else None)


class Guard:
    """Check host, key and size before anything else runs.

    Args:
        api_key: asked for everywhere but on the page and at /health; None asks for none.
        hosts: names that a request may be sent to; None allows all. Names keep pages of strangers
            from a server without a key: their own name, made to point here, is refused.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, hosts: Sequence[str] | None) -> None:
        self._app, self._key, self._hosts = app, api_key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        unread = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        size = 0

        async def read() -> Message:
            nonlocal size, unread
            message = await receive()
            unread = message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > MAX_BODY_BYTES:
                raise HTTPException(413, TOO_LARGE)
            return message

        async def answer(message: Message) -> None:
            # A client still sends what nobody reads; uvicorn would wait for all of it.
            if unread and message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await (self._check(scope, headers) or self._app)(scope, read, answer)

    def _check(self, scope: Scope, headers: Headers) -> Response | None:
        if int(headers.get("content-length", 0)) > MAX_BODY_BYTES:
            return refusal(413, TOO_LARGE)
        name = re.sub(r":\d*$", "", headers.get("host", "")).strip("[]")
        if self._hosts is not None and name not in self._hosts:
            return refusal(403, f"this server is not {name!r}: --host or --api-key opens it")
        path: str = scope["path"]
        is_open = path in ("/", "/health", "/favicon.ico") or path.startswith("/page/")
        if self._key is None or is_open or scope["method"] == "OPTIONS":
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ").encode()
        if hmac.compare_digest(given, self._key.encode()):
            return None
        return refusal(401, "the API key is missing or wrong: send Authorization: Bearer KEY",
                       code="invalid_api_key")  # fmt: skip


def install_handlers(app: FastAPI) -> None:
    """Give every error OpenAI's form."""

    async def refuse(request: Request, error: Exception) -> Response:
        return _explain(error)

    for kind in (RequestValidationError, ArcherChatError, Overloaded, HTTPException,
                 ClientDisconnect, RecursionError, Exception):  # fmt: skip
        app.add_exception_handler(kind, refuse)


def _explain(error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        # Of a union's branches, the one that went furthest says most.
        worst = max(error.errors(), key=lambda each: len(each["loc"]))
        param = _field_name(worst["loc"])
        return refusal(400, f"{param or 'the body'}: {worst['msg']}", param)
    if isinstance(error, UnknownModel):
        return refusal(404, str(error), "model", "model_not_found")
    if isinstance(error, Overloaded):
        return refusal(429, str(error), code="queue_full")
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    if isinstance(error, RecursionError):
        return refusal(400, "the body is nested too deeply")
    if isinstance(error, HTTPException):
        return refusal(error.status_code, str(error.detail))
    if not isinstance(error, ArcherChatError):
        return refusal(500, f"the server failed: {type(error).__name__}")
    # The engine's messages name flags of the command line, which are fields here.
    message = re.sub(r"--([a-z][a-z-]*)", lambda m: m[1].replace("-", "_"), str(error))
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    if param is None and (found := re.search(r"--([a-z][a-z-]*)|\b(prompt)\b", str(error))):
        param = (found[1] or found[2]).replace("-", "_")
    return refusal(400 if isinstance(error, UsageError) else 500, message, param, code)


def _field_name(place: Sequence[str | int]) -> str | None:
    """Return where an error is, such as `messages[0].content`, without the names of types."""
    name = ""
    for step in place[1:]:
        if isinstance(step, int):
            name += f"[{step}]"
        elif not re.search(r"[\[\]()-]|^(str|int|json_invalid)$", step):
            name += f".{step}" if name else step
    return name or None
