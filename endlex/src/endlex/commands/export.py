"""`endlex export`: a run as CSV, JSON, Parquet or a page that opens without a network.

CSV and Parquet have a row per point: metric, step, time, value. The server makes all four. From a
run's directory on this machine, with no server, there are the same CSV, JSON and (with pyarrow)
Parquet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from endlex.client.process import replacing
from endlex.client.transport import quoted
from endlex.commands.rendering import format_bytes
from endlex.commands.targets import find_server, is_run_directory
from endlex.formats import write_run
from endlex.protocol import TABLE, TEXT, UsageError
from endlex.reading import iter_session, read_points, session_files, summarize

SUFFIXES = {".csv": "csv", ".json": "json", ".parquet": "parquet", ".html": "html", ".htm": "html"}


def export(run: str, format: str | None, output: Path | None, url: str | None) -> int:
    """Write one run to a file, or to standard output."""
    kind = format or (SUFFIXES.get(output.suffix.lower()) if output else None) or "csv"
    if is_run_directory(Path(run)):
        if kind == "html":
            raise UsageError(
                f"{run} is a directory here, and {kind} is made by a server: give --format csv "
                "or json, or the run's id after `endlex sync`"
            )
        _write(output, kind, lambda file: _write_local(Path(run), kind, file))
        return 0
    server = find_server(url)
    path = f"{quoted('runs', server.run(run).id, 'export')}?format={kind}"
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
    with replacing(output) as file:
        write(file)
    print(f"{output}: {format_bytes(output.stat().st_size)}", file=sys.stderr)


def _write_local(directory: Path, kind: str, file: IO[bytes]) -> None:
    """Write what a run's directory holds, as the server would."""
    series = []
    for name, points in sorted(read_points(directory).items()):
        rows = sorted(points.items())
        columns = ([s for s, _ in rows], [t for _, (t, _) in rows], [v for _, (_, v) in rows])
        series.append((name, *columns))
    texts, tables = _records(directory, TEXT, "text"), _records(directory, TABLE, "columns", "rows")
    write_run(file, kind, summarize(directory), series, texts, tables)


def _records(directory: Path, kind: str, *keys: str) -> list[dict[str, Any]]:
    """Return texts or tables, latest steps first; of two of a name and step the later one."""
    latest: dict[tuple[int, str], dict[str, Any]] = {}
    for path in session_files(directory):
        for record in iter_session(path):
            whole = isinstance(record.get("step"), int) and isinstance(record.get("name"), str)
            if record["type"] == kind and whole:
                kept = {key: record.get(key) for key in ("name", "step", "time", *keys)}
                latest[(-record["step"], record["name"])] = kept
    return [latest[place] for place in sorted(latest)]
