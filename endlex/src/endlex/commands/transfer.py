"""Move runs and checkpoints: `endlex sync`, `pull`, `push`, `import` and `export`.

A sync sends run directories in the foreground; pull and push move one checkpoint from the server or
to it, verified by hash. An import makes run directories of other tools' files, which `endlex sync`
ships. An export writes a run as others read it: in CSV and Parquet, a row is a point. The server
makes all formats; from a run's directory here there are the same CSV, JSON and Parquet without one.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from endlex.api import LAST, Api, choose_checkpoint
from endlex.client.checkpoints import files_of
from endlex.client.directories import claim_directory, require_run_file, runs_folder
from endlex.client.process import replacing
from endlex.client.transfers import pull_checkpoint, push_checkpoint, sync_directory
from endlex.client.transport import quoted
from endlex.client.verify import require_all_sent
from endlex.commands.rendering import ProgressLine, count, format_bytes, printable
from endlex.commands.targets import is_run_directory, local_runs
from endlex.formats import write_run
from endlex.importers.run_directory import FoundRuns, RunWriter
from endlex.protocol import CHECKPOINT_NAME, RUN_FILE, TABLE, TEXT, EndlexError, UsageError
from endlex.reading import iter_session, read_points, session_files, summarize

NOUNS = {"metrics": "metrics record", "text": "text", "table": "table", "media": "file"}
SUFFIXES = {".csv": "csv", ".json": "json", ".parquet": "parquet", ".html": "html", ".htm": "html"}


def sync(directories: Sequence[str], drop_failed: bool, resend: bool, url: str | None) -> int:
    """Send every directory, by default every run of this machine.

    One that cannot be sent does not keep the others back.
    """
    known = local_runs(directories)
    todo = list(known.found)
    if not directories:
        print(known)
    server = Api(url)
    server.get("/health")  # a wrong address fails at once; later faults are waited out
    transport, line, failed = server.transport, ProgressLine(), 0
    for number, directory in enumerate(todo, 1):
        place = f"[{number}/{len(todo)}] {directory}" if len(todo) > 1 else str(directory)
        line.prefix = f"{place}: "
        try:
            with line:
                sent = sync_directory(
                    directory, transport, line.show, drop_failed=drop_failed, resend=resend
                )
                require_all_sent(directory, transport, sent)
        except KeyboardInterrupt:
            again = shlex.join(map(str, todo[number - 1 :]))
            print(f"stopped; what was sent stays sent. To resume: endlex sync {again}")
            return 130
        except (EndlexError, OSError) as error:
            print(f"{place}: not all sent: {error}")
            failed += 1
        else:
            print(f"{place}: all on {transport.url}")
    return 1 if failed or known.unreadable else 0


def pull(run: str, directory: Path, url: str | None) -> None:
    """Download a checkpoint into a directory, so that a run resumed there joins the old one."""
    word, _, which = run.rpartition("@") if "@" in run else (run, "", LAST)
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file: give a directory")
    server = Api(url)
    try:
        found = server.run(word)
    except EndlexError as error:
        if "@" in run and "has no run" in str(error) and not which.isdecimal():
            raise EndlexError(f"{error} (for the run named {run!r} give {run}@last)") from error
        raise
    checkpoint = choose_checkpoint(found.checkpoints, which, word)
    name, size = checkpoint["name"], format_bytes(checkpoint["bytes"])
    with ProgressLine() as line:
        show = partial(line.show, name)
        pull_checkpoint(found.id, name, directory, server.transport, show)
    about = f"{name} (step {checkpoint['step']:,}, {size}) of run {found.id}"
    print(f"{directory}: checkpoint {about}, every hash verified")
    said = "belongs to something else and is left as it is"
    with suppress(EndlexError):  # a run.json, but not of Endlex
        if claim_directory(directory, found.id, found.project, found.name)["run"] == found.id:
            said = f"is written: endlex.init with directory={str(directory)!r} resumes this run"
    resume = f"ENDLEX_RUN_ID={found.id} makes a run on another machine join it"
    print(f"{directory / RUN_FILE} {said}; {resume}")


def push(
    path: Path, run: str | None, project: str | None, name: str | None, url: str | None, **how: Any
) -> None:
    """Upload a file or a directory as a checkpoint of an existing run, or of a new one.

    `how` is the checkpoint's step and aliases.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    if run and project:
        raise UsageError(f"--run {run} has a project already: leave --project {project} out")
    tidy = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name).lstrip(".")[:120]
    if not name and not CHECKPOINT_NAME.fullmatch(tidy):
        raise UsageError(f"{path} gives no name for a checkpoint: give one with --name")
    if not any(files_of(path)):
        raise EndlexError(f"{str(path)!r} holds no files: nothing to push")
    checkpoint, server = name or tidy, Api(url)
    with ProgressLine() as line:
        if run is None:
            directory = _save(path, project, checkpoint, how)
            sync_directory(directory, server.transport, line.show)
            identity = require_run_file(directory)["run"]
        else:
            here = is_run_directory(Path(run))
            identity = require_run_file(Path(run))["run"] if here else server.run(run).id
            how["progress"] = partial(line.show, checkpoint)
            push_checkpoint(identity, path, checkpoint, server.transport, **how)
    files = server.get(quoted("runs", identity, "checkpoints", checkpoint))["files"]
    size = format_bytes(sum(file["bytes"] for file in files))
    about = f"{checkpoint} of run {identity}: {count(len(files), 'file')}, {size}"
    print(f"checkpoint {about}, published on {server.url}")


def _save(path: Path, project: str | None, name: str, how: dict[str, Any]) -> Path:
    """Make a run here that holds nothing but the checkpoint, and return its directory."""
    import endlex

    with endlex.init(project or path.resolve().parent.name, name, mode="offline") as run:
        run.save(path, name=name, **how)
    if run.directory is None:  # RANK names another rank than 0
        raise UsageError("RANK is set, and only rank 0 records: give --run, or unset RANK")
    return run.directory


def import_runs(tool: str, path: Path, project: str | None, to: Path | None) -> int:
    """Import every run of a tool at or below a path; one that fails does not stop the others."""
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    importer = import_module(f"endlex.importers.{tool}")
    found: FoundRuns = importer.find_runs(path, to or runs_folder(), project)
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


def export(run: str, format: str | None, output: Path | None, url: str | None) -> None:
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
        return
    if output.is_dir():
        raise UsageError(f"{output} is a directory: give a file's name")
    with replacing(output) as file:
        write(file)
    print(f"{output}: {format_bytes(output.stat().st_size)}", file=sys.stderr)


def _write_directory(directory: Path, kind: str, file: IO[bytes]) -> None:
    """Write what a run's directory holds, as the server would."""
    series = []
    for name, points in sorted(read_points(directory).items()):
        steps = sorted(points)
        times, values = zip(*(points[step] for step in steps), strict=True)
        series.append((name, steps, times, values))
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
