"""Several copies of the server behind one address: one per GPU, each a process of its own.

A request goes to the copy that has the least to do, and of equals to the one that the beginning
of its body chooses, so that the turns of a conversation meet the prompts that were kept for it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import tempfile
import threading
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from archerchat.errors import UsageError
from archerchat.home import Home
from archerchat.runtime import build_runtime, prepare_process
from archerchat.serving.app import build_app, show_stats
from archerchat.serving.config import ServeConfig
from archerchat.serving.guard import APIError, build_guarded

BEGINNING_BYTES = 256
POLL_SECONDS = 0.1
SHUTDOWN_SECONDS = 5
URL = "http://127.0.0.1"
OF_ONE_HOP = (b"connection", b"date", b"server", b"transfer-encoding")


class Copy:
    """A process that serves on a socket in `folder`."""

    def __init__(self, config: ServeConfig, home: Home, index: int, folder: Path) -> None:
        self.index, self.in_flight = index, 0
        self._path = folder / f"{index}.sock"
        self._arguments = (replace(config, copies=1), home, index, self._path)
        limits = httpx.Limits(max_keepalive_connections=0)
        transport = httpx.AsyncHTTPTransport(uds=str(self._path), limits=limits)
        self.client = httpx.AsyncClient(transport=transport, base_url=URL, timeout=None)

    async def start(self) -> None:
        """Start the process and wait until it listens.

        Raises:
            UsageError: it ended at once; it says why itself.
        """
        self._path.unlink(missing_ok=True)
        spawn = get_context("spawn").Process
        self.process = spawn(target=_serve, args=self._arguments, daemon=True)
        self.process.start()
        while not self._path.exists():
            if not self.process.is_alive():
                raise UsageError(f"copy {self.index} of the server ended as it started")
            await asyncio.sleep(POLL_SECONDS)

    async def keep_running(self) -> None:
        """Start the process again whenever it ends."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if not self.process.is_alive():
                with suppress(UsageError):
                    await self.start()


class Forwarded(StreamingResponse):
    """What a copy answers to a request, as it comes. A client that leaves ends it there too."""

    def __init__(self, copy: Copy, request: Request) -> None:
        super().__init__(())
        self._copy, self._request = copy, request

    async def stream_response(self, send: Send) -> None:
        request, client = self._request, self._copy.client
        path, query = request.scope["raw_path"], request.scope["query_string"]
        asked = client.build_request(
            request.method,
            "/",
            content=await request.body(),
            headers=_without_hop(request.headers.raw),
            extensions={"target": path + b"?" + query if query else path},
        )
        async with aclosing(await client.send(asked, stream=True)) as found:
            self.status_code, self.body_iterator = found.status_code, found.aiter_raw()
            self.raw_headers = _without_hop(found.headers.raw)
            self.headers["archerchat-copy"] = str(self._copy.index)
            await super().stream_response(send)


def _without_hop(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name not in OF_ONE_HOP]


def _serve(config: ServeConfig, home: Home, index: int, path: Path) -> None:
    """Run a copy, as a process that ends with its parent."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    runtime = build_runtime(config.device, config.dtype)
    if runtime.device.type == "cuda":
        runtime = build_runtime(f"cuda:{index}", config.dtype)
    prepare_process(runtime)
    app = build_app(home, runtime, config)
    gc.freeze()  # as `commands.serve` does
    uvicorn.run(app, uds=str(path), log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS)


def build_front(home: Home, config: ServeConfig, count: int) -> FastAPI:
    """Return the application that hands requests to `count` copies, which it starts and ends."""
    copies: list[Copy] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with tempfile.TemporaryDirectory(prefix="archerchat-") as folder:
            copies.extend(Copy(config, home, index, Path(folder)) for index in range(count))
            await asyncio.gather(*(copy.start() for copy in copies))
            tasks = [asyncio.create_task(copy.keep_running()) for copy in copies]
            yield
            for copy, task in zip(copies, tasks, strict=True):
                task.cancel()
                copy.process.terminate()
            for copy in copies:
                copy.process.join()

    app = build_guarded(config, openapi_url=None, lifespan=lifespan)

    @app.exception_handler(httpx.TransportError)
    async def explain(request: Request, error: httpx.TransportError) -> Response:
        return APIError("a copy of the server ended: try again", status=503).response()

    @app.get("/stats")
    @app.get("/metrics")
    async def stats(request: Request) -> Response:
        headers = [pair for pair in request.headers.raw if pair[0] == b"authorization"]
        found = [(await copy.client.get("/stats", headers=headers)).json() for copy in copies]
        total: dict[str, Any] = {"copies": len(found)}
        for name in found[0]:
            values = [each[name] for each in found]
            is_list = isinstance(values[0], list)
            add = max if name == "uptime_seconds" else sum
            total[name] = sorted(set().union(*values)) if is_list else add(values)
        return show_stats(request, total)

    async def forward(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        with suppress(ClientDisconnect):
            beginning = (await request.body())[:BEGINNING_BYTES]
            copy = min(copies, key=lambda c: (c.in_flight, zlib.crc32(beginning, c.index)))
            copy.in_flight += 1
            try:
                await Forwarded(copy, request)(scope, receive, send)
            finally:
                copy.in_flight -= 1

    app.mount("/", forward)
    return app
