"""The application: routes, errors, timers and their beginning and end, put together.

    from endlex.server.app import build_app, serve
    serve(data_dir, Settings(port=8817))          # what `endlex serve` does

`build_app` touches the data directory only when the application starts (its lifespan).
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from endlex.protocol import PROTOCOL, EndlexError
from endlex.server import api_journal, api_runs
from endlex.server.bodies import json_response
from endlex.server.errors import ApiError, disk_full, is_disk_full
from endlex.server.security import Guard
from endlex.server.settings import DataDir, Settings
from endlex.server.state import Server, open_server

logger = logging.getLogger("endlex")

SWEEP_SECONDS = 15.0


def build_app(data_dir: Path | str, settings: Settings | None = None) -> FastAPI:
    """Return the application that serves one data directory.

    Args:
        data_dir: made when the application starts, if missing.
        settings: the defaults suit one person on one machine.
    """
    settings = settings or Settings()
    data = DataDir(Path(data_dir))
    app = FastAPI(
        title="Endlex", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_lifespan
    )
    app.state.data, app.state.settings = data, settings
    app.state.batches = asyncio.Semaphore(api_journal.MOST_BATCHES_AT_ONCE)
    app.add_middleware(Guard, settings=settings)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(EndlexError, _on_wrong_value)
    app.add_exception_handler(RequestValidationError, _on_wrong_query)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(sqlite3.Error, _on_storage_error)
    app.add_exception_handler(OSError, _on_storage_error)
    app.add_exception_handler(Exception, _on_error)
    app.add_api_route("/health", _health, methods=["GET"])
    for module in (api_journal, api_runs):
        app.include_router(module.router)
    if importlib.util.find_spec("endlex.server.pages") is not None:
        pages = importlib.import_module("endlex.server.pages")
        app.include_router(pages.build_router())
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    server = await asyncio.to_thread(open_server, app.state.data, app.state.settings)
    app.state.server = server
    server.hub.start(asyncio.get_running_loop())
    sweeping = asyncio.create_task(_sweep_forever(server))
    try:
        yield
    finally:
        sweeping.cancel()
        with suppress(asyncio.CancelledError):
            await sweeping
        await asyncio.to_thread(server.close)


async def _sweep_forever(server: Server) -> None:
    while True:
        try:
            events = await asyncio.wrap_future(server.database.write(server.watch.sweep))
            for kind, content in events:
                server.hub.publish(kind, content)
        except (sqlite3.Error, OSError) as error:
            logger.warning("cannot look for stalled runs: %s", error)
        await asyncio.sleep(SWEEP_SECONDS)


async def _health(request: Request) -> Response:
    free = shutil.disk_usage(request.app.state.data.root).free
    content = {"status": "ok", "version": version("endlex"), "protocol": PROTOCOL}
    return json_response({**content, "disk_free_bytes": free})


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
