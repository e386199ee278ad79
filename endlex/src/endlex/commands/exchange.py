"""`endlex import` and `endlex export`: runs from other tools' files, and to files that others read.

An import makes run directories, which `endlex sync` ships. The CSV and Parquet of an export have a
row per point: metric, step, time, value; HTML is a page that opens without a network. The server
makes all formats. From a run's directory on this machine, with no server, there are the same CSV,
JSON and (with pyarrow) Parquet.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from endlex.api import Api
from endlex.client.directories import runs_folder
from endlex.client.process import replacing
from endlex.client.transport import quoted
from endlex.commands.rendering import count, format_bytes, printable
from endlex.commands.targets import is_run_directory
from endlex.formats import write_run
from endlex.importers.run_directory import Found, RunWriter
from endlex.protocol import TABLE, TEXT, EndlexError, UsageError
from endlex.reading import iter_session, read_points, session_files, summarize

NOUNS = {"metrics": "metrics record", "text": "text", "table": "table", "media": "file"}
SUFFIXES = {".csv": "csv", ".json": "json", ".parquet": "parquet", ".html": "html", ".htm": "html"}


def import_runs(tool: str, path: Path, project: str | None, to: Path | None) -> int:
    """Import every run of a tool at or below a path; one that fails does not stop the others."""
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    importer = import_module(f"endlex.importers.{tool}")
    found: Found = importer.find_runs(path, to or runs_folder(), project)
    imported: list[RunWriter] = []
    failed = False
    for place, import_one in found:
        try:
            done = import_one()
        except Exception as error:  # whatever a damaged file makes of a library
            failed = True
            known = isinstance(error, EndlexError | OSError)
            said = str(error) if known else f"{type(error).__name__}: {error}"
            print(f"{place}: not imported: {printable(said)}")
            continue
        for one in done if isinstance(done, list) else [done]:
            imported.append(one)
            shown = [kind for kind in NOUNS if one.counts[kind] or kind == "metrics"]
            counts = ", ".join(count(one.counts[kind], NOUNS[kind]) for kind in shown)
            print(f"{place} -> {one.directory}: {counts}")
            if one.skipped:
                left = ", ".join(f"{n:,} x {printable(what)}" for what, n in one.skipped.items())
                print(f"  left out: {left}")
    if imported:
        directories = " ".join(dict.fromkeys(shlex.quote(str(one.directory)) for one in imported))
        print(f"ship with: endlex sync {directories}")
    return 1 if failed else 0


def export(run: str, format: str | None, output: Path | None, url: str | None) -> int:
    """Write one run to a file that appears whole under its name, or to standard output."""
    kind = format or (SUFFIXES.get(output.suffix.lower()) if output else None) or "csv"
    write: Callable[[IO[bytes]], None]
    if not is_run_directory(Path(run)):
        server = Api(url)
        path = f"{quoted('runs', server.run(run).id, 'export')}?format={kind}"
        write = partial(server.download, path)
    elif kind == "html":
        raise UsageError(
            f"{run} is a directory here, and {kind} is made by a server: give --format csv "
            "or json, or the run's id after `endlex sync`"
        )
    else:
        write = partial(_write_directory, Path(run), kind)
    if output is None:
        if kind == "parquet" and sys.stdout.isatty():
            raise UsageError("parquet is not text: give a file with -o")
        write(sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return 0
    if output.is_dir():
        raise UsageError(f"{output} is a directory: give a file's name")
    with replacing(output) as file:
        write(file)
    print(f"{output}: {format_bytes(output.stat().st_size)}", file=sys.stderr)
    return 0


def _write_directory(directory: Path, kind: str, file: IO[bytes]) -> None:
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
