"""`endlex export`: a run as CSV, JSON, Parquet or a page that opens without a network.

The server makes all four. From a run's directory on this machine, with no server, there are CSV
(one row a step) and JSON.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from endlex.client.journal import session_files
from endlex.commands.local_run import iter_session, summarize, values_of
from endlex.commands.rendering import format_bytes
from endlex.commands.server_api import find_server, run_path
from endlex.commands.targets import find_server_run, is_run_directory
from endlex.commands.usage import UsageError
from endlex.protocol import METRICS, TABLE, TEXT, encode_number

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
    temporary = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{output}: {format_bytes(output.stat().st_size)}", file=sys.stderr)


def write_local_csv(directory: Path, file: IO[bytes]) -> None:
    """Write a run's metrics: a row a step, a column a metric; a later value replaces an earlier."""
    rows: dict[int, dict[str, Any]] = {}
    times: dict[int, float] = {}
    names: dict[str, None] = {}
    for record in _iter_records(directory):
        if record["type"] == METRICS:
            for name, value in values_of(record):
                rows.setdefault(record["step"], {})[name] = encode_number(value)
                times[record["step"]] = record["time"]
                names[name] = None
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        writer = csv.writer(text)
        writer.writerow(["step", "time", *names])
        for step in sorted(rows):
            writer.writerow([step, times[step], *(rows[step].get(name, "") for name in names)])
        text.flush()
    finally:
        text.detach()  # the file is the caller's to close


def write_local_json(directory: Path, file: IO[bytes]) -> None:
    """Write all that a run's journals hold as one JSON object."""
    whole = summarize(directory)
    series: dict[str, dict[int, tuple[float, Any]]] = {}
    texts: list[dict[str, Any]] = []
    tables: list[dict[str, Any]] = []
    for record in _iter_records(directory):
        if record["type"] == METRICS:
            for name, value in values_of(record):
                series.setdefault(name, {})[record["step"]] = (record["time"], encode_number(value))
        elif record["type"] in (TEXT, TABLE):
            kept = {k: v for k, v in record.items() if k not in ("type", "session", "seq")}
            (texts if record["type"] == TEXT else tables).append(kept)
    whole["series"] = {
        name: {
            "step": sorted(points),
            "time": [points[step][0] for step in sorted(points)],
            "value": [points[step][1] for step in sorted(points)],
        }
        for name, points in series.items()
    }
    content = whole | {"texts": texts, "tables": tables}
    file.write(json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n")


def _iter_records(directory: Path) -> Any:
    for path in session_files(directory):
        yield from iter_session(path)
