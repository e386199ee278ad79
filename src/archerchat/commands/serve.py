"""`archerchat serve`: OpenAI's API and a chat page, for the models on this machine."""

from __future__ import annotations

import gc
import os
import socket
import sys

import torch

from archerchat.errors import UsageError
from archerchat.home import Home
from archerchat.runtime import build_runtime, prepare_process
from archerchat.serving.config import ServeConfig

SHUTDOWN_SECONDS = 5


def serve(config: ServeConfig, home: Home) -> None:
    """Serve until Ctrl-C."""
    try:
        import uvicorn

        from archerchat.serving.app import build_app
        from archerchat.serving.copies import build_front
        from archerchat.serving.guard import Connection
    except ModuleNotFoundError as error:
        raise UsageError(
            f"serve needs {error.name}: install the extra, pip install 'archerchat[serve]'"
        ) from error
    if not config.is_local and config.key is None:
        warning = f"no API key: everyone who reaches {config.host} may use this server"
        print(f"{warning}; set --api-key", file=sys.stderr)
    runtime = build_runtime(config.device, config.dtype)
    app = build_app(home, runtime, config)
    gpus = torch.cuda.device_count() if runtime.device.type == "cuda" else 1
    if (copies := config.copies or gpus) > 1:
        app = build_front(home, config, copies)
    else:
        prepare_process(runtime)
    family, host = socket.AF_INET, config.host
    if ":" in host:
        family, host = socket.AF_INET6, f"[{host}]"
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {config.host}:{config.port}: {os.strerror(error.errno or 0)}; "
            "--port names another"
        ) from error
    url = f"http://{host}:{listener.getsockname()[1]}/"
    print(f"{url} is the page; the API is under /v1", flush=True)
    settings = uvicorn.Config(
        app,
        http=Connection,
        log_level="warning",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        server_header=False,
    )
    gc.freeze()  # so that the collector does not scan all libraries' objects while clients wait
    uvicorn.Server(settings).run(sockets=[listener])
