"""`archerchat serve`: OpenAI's API and a chat page, for the models on this machine."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass, field
from typing import Annotated

from archerchat.config import DeviceConfig, Limit, NonNegativeInt, PositiveInt
from archerchat.errors import UsageError
from archerchat.home import Home
from archerchat.runtime import build_runtime, prepare_process

KEY_VARIABLE = "ARCHERCHAT_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHUTDOWN_SECONDS = 5
MAX_CONNECTIONS = 1000


@dataclass(frozen=True)
class ServeConfig(DeviceConfig):
    """Serve models over HTTP: OpenAI's API, and a page to chat in."""

    host: str = "127.0.0.1"
    """Address to listen on. Set an API key before you open it to others."""
    port: Annotated[int, Limit(0, 65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    model: tuple[str, ...] = ()
    """Models to offer, as TAG:STAGE or TAG:STAGE@STEP. Defaults to all on this machine. The first
    answers requests that name none."""
    max_loaded: PositiveInt = 2
    """Most models in memory; the one used longest ago makes room for another."""
    max_batch: PositiveInt = 16
    """Most answers to generate at a time, per model."""
    max_queue: NonNegativeInt = 128
    """Most answers that wait for a place; requests beyond it get status 429."""
    api_key: str | None = field(default=None, repr=False)
    """Key that clients must send. Defaults to the environment variable ARCHERCHAT_API_KEY."""
    cors_origin: tuple[str, ...] = ()
    """Origins, such as https://chat.example.org, whose pages may use the API."""


def serve(config: ServeConfig, home: Home) -> None:
    """Serve until Ctrl-C.

    Raises:
        UsageError: the extra is not installed, there is no such model, or the address is taken.
        CheckpointError: a model is damaged.
    """
    try:
        import uvicorn

        from archerchat.serving.app import ServeOptions, build_app
    except ModuleNotFoundError as error:
        raise UsageError(
            f"serve needs {error.name}: install the extra, pip install 'archerchat[serve]'"
        ) from error
    key = config.api_key or os.environ.get(KEY_VARIABLE) or None
    local = config.host in LOOPBACK
    if not local and key is None:
        print(f"no API key: everyone who reaches {config.host} may use this server; set --api-key",
              file=sys.stderr)  # fmt: skip
    runtime = build_runtime(config.device, config.dtype)
    prepare_process(runtime)
    options = ServeOptions(
        models=config.model,
        max_loaded=config.max_loaded,
        max_batch=config.max_batch,
        max_queue=config.max_queue,
        api_key=key,
        cors_origins=config.cors_origin,
        hosts=LOOPBACK if local and key is None else None,
    )
    app = build_app(home, runtime, options)
    listener = _listen(config.host, config.port)
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(f"http://{host}:{listener.getsockname()[1]}/ is the page; "
          f"the API is under /v1", flush=True)  # fmt: skip
    settings = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        limit_concurrency=MAX_CONNECTIONS,
        server_header=False,
    )
    uvicorn.Server(settings).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror}; --port names another"
        ) from error
