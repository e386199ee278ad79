"""`endlex sync` sends run directories in the foreground; `endlex pull` and `endlex push` move one
checkpoint from the server or to it, verified by hash.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from endlex.api import LAST, Api, choose_checkpoint
from endlex.client.directories import claim_directory, require_run_file
from endlex.client.transfers import pull_checkpoint, push_checkpoint, sync_directory
from endlex.client.transport import Retry, quoted
from endlex.client.verify import require_all_sent
from endlex.commands.rendering import ProgressLine, count, format_bytes
from endlex.commands.targets import is_run_directory, local_runs
from endlex.protocol import CHECKPOINT_NAME, RUN_FILE, EndlexError, UsageError


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


@contextmanager
def _progress() -> Iterator[ProgressLine]:
    """Show progress in the block; a fault of the network says how to resume."""
    try:
        with ProgressLine() as line:
            yield line
    except Retry as error:
        raise EndlexError(f"{error}; run the same command to resume") from error


def pull(run: str, directory: Path, url: str | None) -> int:
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
    with _progress() as line:
        show = partial(line.show, name)
        pull_checkpoint(found.id, name, directory, server.transport, show)
    about = f"{name} (step {checkpoint['step']:,}, {size}) of run {found.id}"
    print(f"{directory}: checkpoint {about}, every hash verified")
    path, resume = directory / RUN_FILE, f"ENDLEX_RUN_ID={found.id} makes a run on another machine"
    try:
        owner = claim_directory(directory, found.id, found.project, found.name)["run"]
    except EndlexError:  # a run.json, but not of Endlex
        owner = ""
    if owner == found.id:
        said = f"is written: endlex.init with directory={str(directory)!r} resumes run {owner}"
    else:
        said = "belongs to something else and is left as it is"
    print(f"{path} {said}; {resume} join it")
    return 0


def push(
    path: Path,
    run: str | None,
    project: str | None,
    name: str | None,
    step: int,
    alias: Sequence[str],
    url: str | None,
) -> int:
    """Upload a file or a directory as a checkpoint of an existing run, or of a new one."""
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    if run and project:
        raise UsageError(f"--run {run} has a project already: leave --project {project} out")
    tidy = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name).lstrip(".")[:120]
    if not name and not CHECKPOINT_NAME.fullmatch(tidy):
        raise UsageError(f"{path} gives no name for a checkpoint: give one with --name")
    checkpoint, server = name or tidy, Api(url)
    with _progress() as line:
        if run is None:
            directory = _save(path, project, checkpoint, step, alias)
            sync_directory(directory, server.transport, line.show)
            identity = require_run_file(directory)["run"]
        else:
            here = is_run_directory(Path(run))
            identity = require_run_file(Path(run))["run"] if here else server.run(run).id
            show = partial(line.show, checkpoint)
            send = partial(push_checkpoint, identity, path, checkpoint, server.transport)
            send(step=step, aliases=alias, progress=show)
    files = server.get(quoted("runs", identity, "checkpoints", checkpoint))["files"]
    size = format_bytes(sum(file["bytes"] for file in files))
    about = f"{checkpoint} of run {identity}: {count(len(files), 'file')}, {size}"
    print(f"checkpoint {about}, published on {server.url}")
    return 0


def _save(path: Path, project: str | None, name: str, step: int, alias: Sequence[str]) -> Path:
    """Make a run here that holds nothing but the checkpoint, and return its directory."""
    import endlex

    with endlex.init(project or path.resolve().parent.name, name, mode="offline") as run:
        run.save(path, step=step, name=name, aliases=alias)
    if run.directory is None:  # RANK names another rank than 0
        raise UsageError("RANK is set, and only rank 0 records: give --run, or unset RANK")
    return run.directory
