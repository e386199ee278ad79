"""What stands around every handler: who may ask, how much, how long; how errors are answered."""

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
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from archerchat.errors import ArcherChatError, UsageError
from archerchat.serving.config import LOOPBACK, ServeConfig

MAX_CONNECTIONS = 1000
MAX_BODY_BYTES = 8 * 2**20
TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES:,} bytes"
REQUEST_SECONDS = 15.0
SEND_SECONDS = 60.0
"""How long a client may leave a chunk unread."""
RETRY_SECONDS = 1
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
HANDLED = (ArcherChatError, RequestValidationError, HTTPException, RecursionError, Exception)
to_json = json.JSONEncoder(separators=(",", ":")).encode


class AsciiJSON(Response):
    """JSON in ASCII, so that half of a surrogate pair in what a client sent harms nobody."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content).encode()


class APIError(UsageError):
    """Report why a request is not answered.

    Args:
        param: the field that is wrong.
        code: OpenAI's name of the error.
    """

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status

    def content(self) -> dict[str, Any]:
        """Return the error as OpenAI's API words it."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind, message = TYPES.get(self.status, default), str(self)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, **headers: str) -> Response:
        if self.status == 429:
            headers["retry-after"] = str(RETRY_SECONDS)
        return AsciiJSON(self.content(), self.status, headers)


async def refuse(request: Request, error: Exception) -> Response:
    """Answer an error in OpenAI's form."""
    return _explain(error).response(**(getattr(error, "headers", None) or {}))


def _explain(error: Exception) -> APIError:
    match error:
        case APIError():
            return error
        case RequestValidationError():
            # Of a union's branches, the one that went furthest says most.
            worst = max(error.errors(), key=lambda each: len(each["loc"]))
            if worst["type"] == "json_invalid":
                place = f"at character {worst['loc'][1] + 1}"
                return APIError(f"the body is not JSON: {worst['ctx']['error']} {place}")
            if isinstance(worst["input"], bytes):  # a web page may send other types unasked
                return APIError(
                    "the body is not marked as JSON: send Content-Type: application/json"
                )
            param = _field_name(worst["loc"])
            return APIError(f"{param or 'the body'}: {worst['msg']}", param)
        case ArcherChatError():  # it may name flags of the command line, which are fields here
            message = re.sub("--([a-z-]+)", lambda flag: flag[1].replace("-", "_"), str(error))
            field = re.search("temperature|logit_bias|prompt", message)
            status = 400 if isinstance(error, UsageError) else 500
            return APIError(message, field and field[0], status=status)
        case HTTPException():
            return APIError(str(error.detail), status=error.status_code)
        case RecursionError():
            return APIError("the body is nested too deeply")
        case _:
            return APIError(f"the server failed: {type(error).__name__}", status=500)


def _field_name(place: Sequence[str | int]) -> str | None:
    """Return where an error is, such as `messages[0].content`, without the names of types."""
    steps, types = place[1:], re.compile(r"[\[\]()-]|^(str|int|json_invalid)$")
    names = (f"[{s}]" if isinstance(s, int) else f".{s}" for s in steps if not types.search(str(s)))
    return "".join(names).removeprefix(".") or None


class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """A connection that closes when a request has not arrived whole in `REQUEST_SECONDS`.

    Uvicorn itself waits for ever for the end of a request's headers and of its body. A request gets
    up to twice that time, as the connection is looked at in intervals.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            error = APIError("the server has too many connections: try again", status=503)
            self.app = error.response(connection="close")
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


class Guard:
    """Check host, key and size before anything else runs; end what a client does not read.

    Without a key, a server for this machine alone answers to its own names only: a stranger's page
    could reach it by a name of its own, made to point here.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app, self._config, self._key = app, config, config.key

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
                raise HTTPException(413, TOO_LARGE)  # FastAPI hides other errors of a body
            return message

        async def answer(message: Message) -> None:
            # A client still sends what nobody reads; uvicorn would wait for all of it.
            if unread and message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            async with asyncio.timeout(SEND_SECONDS):  # wait_for may lose a cancellation
                await send(message)

        error = self._check(scope, headers)
        await (error.response() if error else self._app)(scope, read, answer)

    def _check(self, scope: Scope, headers: Headers) -> APIError | None:
        if int(headers.get("content-length", 0)) > MAX_BODY_BYTES:
            return APIError(TOO_LARGE, status=413)
        name = re.sub(r":\d*$", "", headers.get("host", "")).strip("[]")
        if self._config.is_local and self._key is None and name not in LOOPBACK:
            message = f"this server is not {name!r}: --host or --api-key opens it"
            return APIError(message, status=403)
        path: str = scope["path"]
        is_open = path in ("/", "/health", "/favicon.ico") or path.startswith("/page/")
        if self._key is None or is_open or scope["method"] == "OPTIONS":
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ").encode()
        if hmac.compare_digest(given, self._key.encode()):
            return None
        message = "the API key is missing or wrong: send Authorization: Bearer KEY"
        return APIError(message, code="invalid_api_key", status=401)


def build_guarded(config: ServeConfig, **options: Any) -> FastAPI:
    """Return an application without routes, behind a guard."""
    handlers: Any = dict.fromkeys(HANDLED, refuse)
    app = FastAPI(
        title="ArcherChat", docs_url=None, redoc_url=None, exception_handlers=handlers, **options
    )
    app.add_middleware(Guard, config=config)
    if config.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    return app
