"""What goes wrong in a route, as an answer: a message that names the value and the remedy."""

from __future__ import annotations

import logging
import sqlite3

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from endlex.protocol import EndlexError
from endlex.server.api.bodies import json_response
from endlex.server.errors import ApiError, disk_full, is_disk_full

logger = logging.getLogger("endlex")


def install_handlers(app: FastAPI) -> None:
    """Let the application answer every exception as JSON."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(EndlexError, _on_wrong_value)
    app.add_exception_handler(RequestValidationError, _on_wrong_query)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(sqlite3.Error, _on_storage_error)
    app.add_exception_handler(OSError, _on_storage_error)
    app.add_exception_handler(Exception, _on_error)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return json_response(error.body(), error.status, error.headers)


async def _on_wrong_value(request: Request, error: Exception) -> Response:
    return json_response({"error": str(error)}, 422)


async def _on_wrong_query(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    wrong = [f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors()]
    return json_response({"error": "; ".join(wrong)}, 422)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    message = f"{request.method} {path!r}: {error.detail}"
    return json_response({"error": message}, error.status_code, dict(error.headers or {}))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody is there to read it


async def _on_storage_error(request: Request, error: Exception) -> Response:
    if is_disk_full(error):
        return await _on_api_error(request, disk_full())
    logger.error("%s %s: %s", request.method, request.url.path, error, exc_info=error)
    message = "the server cannot use its disk or database; its log says more: try again later"
    return json_response({"error": message}, 503, {"Retry-After": "10"})


async def _on_error(request: Request, error: Exception) -> Response:
    return json_response({"error": "the server failed at this; its log says more"}, 500)
