"""`endlex export`: a run as CSV, JSON, Parquet or a page that opens without a network.

CSV and Parquet have a row per point: metric, step, time, value. The server makes all four. From a
run's directory on this machine, with no server, there are the same CSV, JSON and (with pyarrow)
Parquet.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from endlex.api import run_path
from endlex.client.process import fsync
from endlex.commands.rendering import format_bytes
from endlex.commands.targets import find_server, is_run_directory
from endlex.protocol import TABLE, TEXT, EndlexError, UsageError, encode_number
from endlex.reading import iter_session, read_points, session_files, summarize

SUFFIXES = {".csv": "csv", ".json": "json", ".parquet": "parquet", ".html": "html", ".htm": "html"}
RUN_KEYS = ("run", "project", "name", "status", "created", "tags", "group", "notes", "host")
SESSION_KEYS = ("session", "kind", "rank", "host", "started", "offset", "damaged_lines", "status")
CHECKPOINT_KEYS = ("name", "step", "bytes", "aliases", "metadata")


def export(run: str, format: str | None, output: Path | None, url: str | None) -> int:
    """Write one run to a file, or to standard output."""
    kind = format or (SUFFIXES.get(output.suffix.lower()) if output else None) or "csv"
    if is_run_directory(Path(run)):
        if kind not in LOCAL_FORMATS:
            raise UsageError(
                f"{run} is a directory here, and {kind} is made by a server: give --format csv "
                "or json, or the run's id after `endlex sync`"
            )
        _write(output, kind, lambda file: LOCAL_FORMATS[kind](Path(run), file))
        return 0
    server = find_server(url)
    path = f"{run_path(server.run(run).id, 'export')}?format={kind}"
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


def _rows(directory: Path) -> Iterator[tuple[str, int, float, float]]:
    for name, points in sorted(read_points(directory).items()):
        for step, (time, value) in sorted(points.items()):
            yield name, step, float(time), value


def _write_csv(directory: Path, file: IO[bytes]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        writer = csv.writer(text)
        writer.writerow(["metric", "step", "time", "value"])
        writer.writerows((*row, encode_number(value)) for *row, value in _rows(directory))
        text.flush()
    finally:
        text.detach()  # the file is the caller's to close


def _write_parquet(directory: Path, file: IO[bytes]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise EndlexError("Parquet needs pyarrow: pip install pyarrow, or give csv") from error
    columns = list(zip(*_rows(directory), strict=True)) or [(), (), (), ()]
    kinds = (pa.dictionary(pa.int32(), pa.string()), pa.int64(), pa.float64(), pa.float64())
    arrays = [pa.array(c, k) for c, k in zip(columns, kinds, strict=True)]
    pq.write_table(pa.table(arrays, names=["metric", "step", "time", "value"]), file)


def _write_json(directory: Path, file: IO[bytes]) -> None:
    """Write all that a run's journals hold as one JSON object."""
    whole = summarize(directory)
    content: dict[str, Any] = {key: whole[key] for key in (*RUN_KEYS, "config")}
    content["sessions"] = [{key: s[key] for key in SESSION_KEYS} for s in whole["sessions"]]
    checkpoints = sorted(whole["checkpoints"], key=lambda checkpoint: int(checkpoint["step"]))
    content["checkpoints"] = [{key: c[key] for key in CHECKPOINT_KEYS} for c in checkpoints]
    series: dict[str, dict[str, list[Any]]] = {}
    for name, step, time, value in _rows(directory):
        one = series.setdefault(name, {"step": [], "time": [], "value": []})
        for key, item in (("step", step), ("time", time), ("value", encode_number(value))):
            one[key].append(item)
    content["series"] = series
    content["texts"] = _records(directory, TEXT, ("text",))
    content["tables"] = _records(directory, TABLE, ("columns", "rows"))
    file.write(json.dumps(content, ensure_ascii=False).encode() + b"\n")


def _records(directory: Path, kind: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return texts or tables, latest steps first; of two of a name and step the later one."""
    latest: dict[tuple[int, str], dict[str, Any]] = {}
    for path in session_files(directory):
        for record in iter_session(path):
            whole = isinstance(record.get("step"), int) and isinstance(record.get("name"), str)
            if record["type"] == kind and whole:
                kept = {key: record.get(key) for key in ("name", "step", "time", *keys)}
                latest[(-record["step"], record["name"])] = kept
    return [latest[place] for place in sorted(latest)]


LOCAL_FORMATS = {"csv": _write_csv, "json": _write_json, "parquet": _write_parquet}
