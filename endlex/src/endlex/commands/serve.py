"""`endlex serve`: run the server, which is the extra `endlex[server]`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from endlex.protocol import EndlexError

SERVER_PACKAGES = {"fastapi", "uvicorn", "starlette", "sse_starlette", "orjson", "numpy", "pyarrow"}
GB = 10**9


def import_server(module: str) -> Any:
    """Return a module of the server.

    Raises:
        EndlexError: it, or what it needs, is not installed.
    """
    try:
        return importlib.import_module(f"endlex.server.{module}")
    except ModuleNotFoundError as error:
        if error.name == "endlex.server":
            raise EndlexError(
                "only the client is installed here, and this is the server's: "
                "pip install 'endlex[server]', or in a clone pip install ./endlex ./endlex/server"
            ) from error
        if (error.name or "").partition(".")[0] not in SERVER_PACKAGES:
            raise
        raise EndlexError(
            f"the server needs {error.name}, which is not installed here: "
            "pip install 'endlex[server]', or in a clone pip install ./endlex ./endlex/server"
        ) from error


def data_directory(data: Path | None) -> Path:
    """Return the server's data directory: the one given, else the environment's or the default."""
    if data is not None:
        return data
    return Path(import_server("settings").DataDir.from_environment().root)


def serve(
    host: str,
    port: int | None,
    data: Path | None,
    public: bool,
    trusted_proxy: str | None,
    root_path: str,
    tls_cert: Path | None,
    tls_key: Path | None,
    alerts: Sequence[str],
    alert_webhook: str | None,
    ntfy: str | None,
    stall_minutes: float,
    min_free_gb: float | None,
) -> int:
    """Serve until a signal ends it."""
    server = import_server("app")
    settings = import_server("settings")
    alerts = [*alerts, *os.environ.get("ENDLEX_ALERTS", "").split()]
    for target in alerts:
        import_server("watch.notify").check_target(target)
    chosen = settings.Settings(
        host=host,
        port=settings.DEFAULT_PORT if port is None else port,
        public=public,
        trusted_proxy=trusted_proxy,
        root_path=root_path,
        tls_cert=tls_cert,
        tls_key=tls_key,
        alerts=tuple(alerts),
        alert_webhook=alert_webhook,
        ntfy=ntfy,
        stall_minutes=stall_minutes,
        min_free_bytes=None if min_free_gb is None else int(min_free_gb * GB),
    )
    server.serve(data_directory(data), chosen)
    return 0
