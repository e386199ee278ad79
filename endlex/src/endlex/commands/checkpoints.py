"""`endlex pull` and `endlex push`: one checkpoint from the server, or to it, verified by hash."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from endlex.api import LAST, Api, choose_checkpoint, helpful, run_path
from endlex.client.downloads import pull_checkpoint
from endlex.client.run_directory import claim_directory, read_run_file
from endlex.client.sync import push_checkpoint, sync_directory
from endlex.client.transport import Retry
from endlex.commands.rendering import ProgressLine, count, format_bytes
from endlex.commands.targets import (
    find_server,
    find_server_run,
    is_run_directory,
    open_run_directory,
)
from endlex.commands.usage import UsageError
from endlex.protocol import CHECKPOINT_NAME, RUN_FILE, EndlexError


def pull(run: str, directory: Path, url: str | None) -> int:
    """Download a checkpoint into a directory, and let a run that is resumed there be the same."""
    word, _, which = run.rpartition("@") if "@" in run else (run, "", LAST)
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file: give a directory")
    server = find_server(url)
    found = _find(server, word, run, which)
    checkpoint = choose_checkpoint(found["checkpoints"], which, word)
    size = format_bytes(checkpoint["bytes"])
    line = ProgressLine()
    show = partial(line.show_bytes, checkpoint["name"])
    try:
        pull_checkpoint(found["run"], checkpoint["name"], directory, server.transport, show)
    except Retry as error:
        line.clear()
        raise EndlexError(f"{helpful(error)}; the same command goes on where it stopped") from error
    line.clear()
    print(
        f"{directory}: checkpoint {checkpoint['name']} (step {checkpoint['step']:,}, {size}) of "
        f"run {found['run']}, every hash verified"
    )
    print(_join_run(directory, found))
    return 0


def _find(server: Api, word: str, whole: str, which: str) -> dict[str, Any]:
    """Return the run; a name may hold an @ itself."""
    try:
        return find_server_run(server, word)
    except EndlexError as error:
        if "@" in whole and "has no run" in str(error) and not which.isdecimal():
            raise EndlexError(f"{error} (for the run named {whole!r} give {whole}@last)") from error
        raise


def _join_run(directory: Path, found: dict[str, Any]) -> str:
    """Write run.json unless the place is taken, and say how a resumed run joins the old one."""
    identity = found["run"]
    resume = f"ENDLEX_RUN_ID={identity} makes a run that is resumed elsewhere join it"
    path = directory / RUN_FILE
    if path.exists():
        try:
            owner = read_run_file(directory)
        except EndlexError:
            owner = None
        if owner is None or owner["run"] != identity:
            return f"{path} is something else and stays as it is; {resume}"
    claim_directory(directory, identity, found["project"], found["name"])
    return (
        f"{path} is written: endlex.init with directory={str(directory)!r} goes on with run "
        f"{identity}; {resume}"
    )


def push(
    path: Path,
    run: str | None,
    project: str | None,
    name: str | None,
    step: int,
    alias: Sequence[str],
    url: str | None,
) -> int:
    """Upload a file or a directory as a checkpoint, of a run that is there or of a new one."""
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    if run and project:
        raise UsageError(f"--run {run} has a project already: leave --project {project} out")
    if not (checkpoint := name or _checkpoint_name(path)):
        raise UsageError(f"{path} gives no name for a checkpoint: give one with --name")
    server = find_server(url)
    line = ProgressLine()
    try:
        if run is None:
            identity = _push_new(server, path, project, checkpoint, step, alias, line)
        else:
            identity = _push_to(server, run, path, checkpoint, step, alias, line)
    except Retry as error:
        line.clear()
        raise EndlexError(f"{helpful(error)}; the same command goes on where it stopped") from error
    line.clear()
    published = server.get(run_path(identity, "checkpoints", checkpoint))
    files = published["files"]
    size = sum(file["bytes"] for file in files)
    print(
        f"checkpoint {checkpoint} of run {identity}: {count(len(files), 'file')}, "
        f"{format_bytes(size)}, published on {server.url}"
    )
    return 0


def _checkpoint_name(path: Path) -> str:
    tidy = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name).lstrip(".")[:120]
    return tidy if CHECKPOINT_NAME.fullmatch(tidy) else ""


def _push_to(
    server: Api,
    run: str,
    path: Path,
    name: str,
    step: int,
    alias: Sequence[str],
    line: ProgressLine,
) -> str:
    if is_run_directory(Path(run)):
        identity = open_run_directory(Path(run))["run"]
    else:
        identity = str(find_server_run(server, run)["run"])
    show = partial(line.show_bytes, name)
    push_checkpoint(identity, path, name, server.transport, step=step, aliases=alias, progress=show)
    return identity


def _push_new(
    server: Api,
    path: Path,
    project: str | None,
    name: str,
    step: int,
    alias: Sequence[str],
    line: ProgressLine,
) -> str:
    """Make a run here that holds nothing but the checkpoint, and send it."""
    import endlex

    with endlex.init(project or path.resolve().parent.name, name, mode="offline") as started:
        started.save(path, step=step, name=name, aliases=alias)
        directory = started.directory
    if directory is None:  # RANK names another rank than 0
        raise UsageError("RANK is set, and only rank 0 records: give --run, or unset RANK")
    sync_directory(directory, server.transport, line.show_bytes)
    return open_run_directory(directory)["run"]
