"""`endlex export`: a run as CSV, JSON, Parquet or a page that opens without a network.

The server makes all four. From a run's directory on this machine, with no server, there are the
same CSV (one row a step) and JSON.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from endlex.client.process import fsync
from endlex.commands.local_export import write_local_csv, write_local_json
from endlex.commands.rendering import format_bytes
from endlex.commands.server_api import find_server, run_path
from endlex.commands.targets import find_server_run, is_run_directory
from endlex.commands.usage import UsageError

SUFFIXES = {".csv": "csv", ".json": "json", ".parquet": "parquet", ".html": "html", ".htm": "html"}
LOCAL_FORMATS = ("csv", "json")


def export(run: str, format: str | None, output: Path | None, url: str | None) -> int:
    """Write one run to a file, or to standard output."""
    kind = format or (SUFFIXES.get(output.suffix.lower()) if output else None) or "csv"
    if is_run_directory(Path(run)):
        if kind not in LOCAL_FORMATS:
            raise UsageError(
                f"{run} is a directory here, and {kind} is made by a server: give --format csv "
                "or json, or the run's id after `endlex sync`"
            )
        write = write_local_csv if kind == "csv" else write_local_json
        _write(output, kind, lambda file: write(Path(run), file))
        return 0
    server = find_server(url)
    identity = find_server_run(server, run)["run"]
    path = f"{run_path(identity, 'export')}?format={kind}"
    _write(output, kind, lambda file: server.download(path, file))
    return 0


def _write(output: Path | None, kind: str, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a file that appears whole under its name, or standard output."""
    if output is None:
        if kind == "parquet" and sys.stdout.isatty():
            raise UsageError("parquet is not text: give a file with -o")
        write(sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    if output.is_dir():
        raise UsageError(f"{output} is a directory: give a file's name")
    temporary = output.with_name(f".{output.name}.{os.urandom(4).hex()}.part")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            fsync(file.fileno())
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{output}: {format_bytes(output.stat().st_size)}", file=sys.stderr)
