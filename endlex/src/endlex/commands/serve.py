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
    """Return a module of the server."""
    try:
        return importlib.import_module(f"endlex.server.{module}")
    except ModuleNotFoundError as error:
        lacking = error.name or ""
        if lacking != "endlex.server" and lacking.partition(".")[0] not in SERVER_PACKAGES:
            raise
        what = (
            "only the client is installed here, and this is the server's"
            if lacking == "endlex.server"
            else f"the server needs {lacking}, which is not installed here"
        )
        remedy = "pip install 'endlex[server]', or in a clone pip install ./endlex ./endlex/server"
        raise EndlexError(f"{what}: {remedy}") from error


def data_directory(data: Path | None) -> Path:
    """Return the server's data directory: the one given, else the environment's or the default."""
    if data is not None:
        return data
    return Path(import_server("settings").DataDir.from_environment().root)


def serve(
    data: Path | None,
    port: int | None,
    alerts: Sequence[str],
    min_free_gb: float | None,
    **given: Any,
) -> int:
    """Serve until a signal ends it.

    Args:
        given: the other arguments, which `Settings` takes as they are.
    """
    server = import_server("app")
    settings = import_server("settings")
    alerts = [*alerts, *os.environ.get("ENDLEX_ALERTS", "").split()]
    for target in alerts:
        import_server("watch.notify").check_target(target)
    chosen = settings.Settings(
        port=settings.DEFAULT_PORT if port is None else port,
        alerts=tuple(alerts),
        min_free_bytes=None if min_free_gb is None else int(min_free_gb * GB),
        **given,
    )
    server.serve(data_directory(data), chosen)
    return 0
