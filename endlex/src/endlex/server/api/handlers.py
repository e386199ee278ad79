"""Turn exceptions into JSON answers whose message names the value and the remedy."""

from __future__ import annotations

import logging
import sqlite3
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from endlex.protocol import EndlexError
from endlex.server.api.bodies import json_response
from endlex.server.errors import ApiError, disk_full, is_disk_full

logger = logging.getLogger("endlex")

WRONG = (RequestValidationError, ValidationError)
STORAGE = (sqlite3.Error, OSError)


def install_handlers(app: FastAPI) -> None:
    """Let the application answer every exception as JSON."""
    for kind in (ApiError, EndlexError, *WRONG, HTTPException, ClientDisconnect, *STORAGE):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(Exception, _answer)


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, STORAGE) and is_disk_full(error):
        error = disk_full()
    if isinstance(error, ApiError):
        return json_response(error.body(), error.status, error.headers)
    if isinstance(error, EndlexError):
        return json_response({"error": str(error)}, 422)
    if isinstance(error, WRONG):
        wrong = "; ".join(map(_describe, error.errors()))
        return json_response({"error": wrong}, 422)
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path[:200]!r}: {error.detail}"
        return json_response({"error": message}, error.status_code, dict(error.headers or {}))
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)  # nobody is there to read it
    if isinstance(error, STORAGE):
        logger.error("%s %s: %s", request.method, request.url.path, error, exc_info=error)
        message = "the server cannot use its disk or database; its log says more: try again later"
        return json_response({"error": message}, 503, {"Retry-After": "10"})
    return json_response({"error": "the server failed at this; its log says more"}, 500)


def _describe(wrong: Any) -> str:
    """Return where a query or a body is wrong, what stands there, and what is asked for."""
    place = ".".join(str(part) for part in wrong["loc"] if part not in ("query", "path"))
    given = "" if wrong["type"] == "missing" else f" {str(wrong['input'])[:40]!r}"
    return f"{place or 'the body'}{given}: {wrong['msg']}"
