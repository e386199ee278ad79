"""The application: puts guards, routes, errors and timers together, and starts and stops them.

    from endlex.server.app import build_app, serve
    serve(data_dir, Settings(port=8817))          # what `endlex serve` does

`build_app` touches the data directory only when the application starts (its lifespan).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import shutil
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from endlex.protocol import PROTOCOL, EndlexError
from endlex.server.api import auth, checkpoints, journal, runs
from endlex.server.api.auth import list_tokens
from endlex.server.api.bodies import json_response
from endlex.server.errors import ApiError, disk_full, is_disk_full
from endlex.server.events import Hub
from endlex.server.settings import DataDir, Settings
from endlex.server.state import Server
from endlex.server.store.retention import sweep
from endlex.server.web import export
from endlex.server.web.pages import install_pages

logger = logging.getLogger("endlex")

WRONG = (RequestValidationError, ValidationError)
STORAGE = (sqlite3.Error, OSError)
ANSWERED = (ApiError, EndlexError, *WRONG, HTTPException, ClientDisconnect, *STORAGE, Exception)

WATCH_SECONDS = 15.0
CLEAN_SECONDS = 3600.0
SWITCH_SECONDS = 0.001
"""How long a thread may hold the interpreter; with Python's default of 5 ms, pages are slow while
several threads work."""
SHUTDOWN_SECONDS = 10
MOST_CONNECTIONS = 1000
POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


def build_app(data_dir: Path | str, settings: Settings | None = None) -> FastAPI:
    """Return the application of one data directory, which is made when it starts, if missing."""
    settings = settings or Settings()
    data = DataDir(Path(data_dir))
    app = FastAPI(
        title="Endlex", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_lifespan
    )
    app.state.data, app.state.settings = data, settings
    app.state.identity = {"status": "ok", "version": version("endlex"), "protocol": PROTOCOL}
    app.state.batches = asyncio.Semaphore(journal.MOST_BATCHES_AT_ONCE)
    app.add_middleware(Guard, settings=settings)
    for kind in ANSWERED:
        app.add_exception_handler(kind, _answer)
    app.add_api_route("/health", _health, methods=["GET"])
    for module in (journal, runs, checkpoints, export, auth):
        app.include_router(module.router)
    install_pages(app, settings.root_path)
    return app


class Guard:
    """ASGI middleware that refuses what is misaddressed or foreign, and adds security headers.

    On loopback without tokens anything that runs on the machine may read and write. What must not
    get there are pages of other sites in the owner's browser: a request must name a loopback host
    (DNS rebinding), and one that changes something must not come from another origin.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        root = self._settings.root_path
        if root and (scope["path"] == root or scope["path"].startswith(f"{root}/")):
            scope = {**scope, "path": scope["path"].removeprefix(root) or "/"}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                is_data = scope["path"].startswith("/api/")  # the rest has entity tags, or is short
                headers.setdefault("Cache-Control", "no-store" if is_data else "no-cache")
            await send(message)

        refusal = self._refusal(scope["method"], Headers(scope=scope))
        app = self._app
        if refusal is not None:
            app = json_response({"error": refusal}, 403, {"Connection": "close"})
        await app(scope, receive, send_with_headers)

    def _refusal(self, method: str, headers: Headers) -> str | None:
        host, name = headers.get("host", ""), ""
        with suppress(ValueError):
            name = urlsplit(f"//{host}").hostname or ""  # without the port and brackets
        if not self._settings.public and not is_loopback(name):
            return (
                f"host {host[:80]!r} is not a name of this machine: serve others with "
                "`endlex serve --public` and tokens"
            )
        if method in SAFE_METHODS:
            return None
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "a page of another site may not write here"
        origin, hosts = headers.get("origin"), {host.lower()}
        if self._settings.trusted_proxy:
            hosts.add(headers.get("x-forwarded-host", host).lower())
        if origin is None or (origin != "null" and urlsplit(origin).netloc.lower() in hosts):
            return None
        return f"origin {origin[:80]!r} may not write here: open the page at {host[:80]!r}"


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without a port, is this machine's own."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, STORAGE) and is_disk_full(error):
        error = disk_full()
    if isinstance(error, WRONG):
        error = EndlexError("; ".join(map(_describe, error.errors())))
    if isinstance(error, EndlexError):
        error = ApiError(422, str(error))
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path[:200]!r}: {error.detail}"
        error = ApiError(error.status_code, message, dict(error.headers or {}))
    if isinstance(error, STORAGE):
        logger.error("%s %s: %s", request.method, request.url.path, error, exc_info=error)
        message = "the server cannot use its disk or database; its log says more: try again later"
        error = ApiError(503, message, {"Retry-After": "10"})
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)  # nobody is there to read it
    if not isinstance(error, ApiError):
        error = ApiError(500, "the server failed at this; its log says more")
    return json_response(error.body, error.status, error.headers)


def _describe(wrong: Any) -> str:
    """Return where a query or a body is wrong, what stands there, and what is asked for."""
    place = ".".join(str(part) for part in wrong["loc"] if part not in ("query", "path"))
    given = "" if wrong["type"] == "missing" else f" {str(wrong['input'])[:40]!r}"
    return f"{place or 'the body'}{given}: {wrong['msg']}"


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    hub = Hub(asyncio.get_running_loop())
    server = await asyncio.to_thread(Server, app.state.data, app.state.settings, hub)
    app.state.server = server
    jobs = ((_watch, WATCH_SECONDS), (_clean, CLEAN_SECONDS))
    timers = [asyncio.create_task(_repeat(job, server, pause)) for job, pause in jobs]
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        await asyncio.gather(*timers, return_exceptions=True)
        await asyncio.to_thread(server.close)


async def _repeat(
    job: Callable[[Server], Coroutine[Any, Any, None]], server: Server, pause: float
) -> None:
    while True:
        try:
            await job(server)
        except (sqlite3.Error, OSError) as error:
            logger.warning("cannot %s, will try again: %s", job.__name__.strip("_"), error)
        await asyncio.sleep(pause)


async def _watch(server: Server) -> None:
    """Look for silent runs and full disks."""
    for kind, content in await server.write(server.watch.sweep):
        server.hub.publish(kind, content)


async def _clean(server: Server) -> None:
    """Remove what nothing uses any more."""
    await server.file(sweep, server.database, server.blobs)


async def _health(request: Request) -> Response:
    free = shutil.disk_usage(request.app.state.data.root).free
    return json_response({**request.app.state.identity, "disk_free_bytes": free})


def serve(data_dir: Path | str, settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; prints the address once it listens.

    It is an `EndlexError` that the settings would let strangers in, the address is taken, or the
    data directory cannot be made.
    """
    data_dir = Path(data_dir)
    if not settings.public and not is_loopback(settings.host):
        raise EndlexError(
            f"host {settings.host!r} lets other machines in: add --public, and make a token "
            "with `endlex token create`"
        )
    if settings.public and all(token["revoked"] is not None for token in list_tokens(data_dir)):
        raise EndlexError(
            "a public server needs a token: make one with "
            "`endlex token create --scope write,checkpoint --name BOX`"
        )
    DataDir(data_dir).create()
    listener = _listen(settings)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    sys.setswitchinterval(SWITCH_SECONDS)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    config = uvicorn.Config(
        build_app(data_dir, settings),
        log_config=None,
        log_level="warning",
        access_log=False,  # it would print whole addresses, queries included
        server_header=False,
        proxy_headers=settings.trusted_proxy is not None,
        forwarded_allow_ips=settings.trusted_proxy or "",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        timeout_keep_alive=75,
        limit_concurrency=MOST_CONNECTIONS,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    kind = "https" if settings.tls_cert else "http"
    print(f"endlex: serving {data_dir} on {kind}://{shown}:{port}", flush=True)
    with listener:
        uvicorn.Server(config).run(sockets=[listener])


def _listen(settings: Settings) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        return socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except OSError as error:
        raise EndlexError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror or error}): "
            "choose another with --port"
        ) from error
