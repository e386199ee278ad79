"""Run a server until it is told to stop: what `endlex serve` does."""

from __future__ import annotations

import logging
import socket
import sys
from pathlib import Path

import uvicorn

from endlex.protocol import EndlexError
from endlex.server.app import build_app
from endlex.server.auth import list_tokens
from endlex.server.security import is_loopback
from endlex.server.settings import Settings

SWITCH_SECONDS = 0.001
"""How long a thread may keep the interpreter from the one that answers; Python's default of 5 ms
adds up to a slow page while several threads work."""
SHUTDOWN_SECONDS = 10
MOST_CONNECTIONS = 1000


def serve(data_dir: Path | str, settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; prints the address once it listens.

    Raises:
        EndlexError: the settings would let strangers in, or the address is taken.
    """
    data_dir = Path(data_dir)
    _require_closed_or_tokens(data_dir, settings)
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
    )
    print(f"endlex: serving {data_dir} on http://{shown}:{port}", flush=True)
    with listener:
        uvicorn.Server(config).run(sockets=[listener])


def _require_closed_or_tokens(data_dir: Path, settings: Settings) -> None:
    if not settings.public:
        if not is_loopback(settings.host):
            raise EndlexError(
                f"host {settings.host!r} lets other machines in: add --public, and make a token "
                "with `endlex token create`"
            )
        return
    if not any(token.revoked is None for token in list_tokens(data_dir)):
        raise EndlexError(
            "a public server needs a token: make one with "
            "`endlex token create --scope write,checkpoint --name BOX`"
        )


def _listen(settings: Settings) -> socket.socket:
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen(1024)
    except OSError as error:
        raise EndlexError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror or error}): "
            "choose another with --port"
        ) from error
    return listener
