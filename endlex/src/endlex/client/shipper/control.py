"""The shipper as others see it: start it, stop it, ask how far it is, wait for it.

One shipper serves a run's directory. It holds the lock of `shipper.lock`, in which its process is
named, and publishes how far it is in `shipper.json`. Nothing here uses the network.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from endlex.client import checkpoints, process
from endlex.protocol import MEDIA_DIR, EndlexError
from endlex.reading import content_length, session_files

LOCK_FILE, STATE_FILE, LOG_FILE = "shipper.lock", "shipper.json", "shipper.log"
FINISH_SECONDS = 4.0  # how long the end of a run waits for the server to have everything
BEGIN_SECONDS = 1.0  # without a living shipper, at a run's end, until another one is started
SHIPPER_POLL_SECONDS = 0.02
NAMING_POLLS = 10
DONE, STOPPED = "done", "stopped"  # how a shipper ended: nothing was left, or it was asked to
FOREGROUND, BACKGROUND = "foreground", "background"  # `endlex sync`, and a trainer's shipper


class Holder(NamedTuple):
    """The process that has a directory's lock; its `pid` is 0 if it could not be written."""

    pid: int
    kind: str
    name: str  # as `process_name` has it


def take_lock(directory: Path, kind: str, *, seconds: float = 0.0) -> IO[str] | None:
    """Become the directory's only shipper until the returned file is closed.

    Waits that long for another one to end, and returns None if it does not.
    """
    try:
        lock = (directory / LOCK_FILE).open("a+")
    except OSError as error:
        if error.errno not in process.READ_ONLY:
            raise
        return Path(os.devnull).open("a+")  # nobody else can write here either: no lock is needed
    deadline = time.monotonic() + seconds
    while _holder(lock) is not None:
        if time.monotonic() >= deadline:
            lock.close()
            return None
        time.sleep(SHIPPER_POLL_SECONDS)
    with contextlib.suppress(OSError):  # a full disk: then nobody knows the process, no more
        os.ftruncate(lock.fileno(), 0)
        pid, _, name = process.process_name().partition(" ")
        os.write(lock.fileno(), f"{pid} {kind} {name}\n".encode())
    return lock


@contextlib.contextmanager
def holding(lock: IO[str]) -> Iterator[None]:
    """Give up what `take_lock` returned after the block, and take the process's name out of it."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.ftruncate(lock.fileno(), 0)
        lock.close()


def _holder(lock: IO[str]) -> Holder | None:
    """Lock the open file and return None, or return the process that has it."""
    locked = process.try_lock(lock)
    if locked:
        return None
    lock.seek(0)
    pid, kind, *rest = [*lock.read(1000).split(), "", ""]
    holder = Holder(int(pid) if pid.isdecimal() else 0, kind, " ".join([pid, *rest]).strip())
    # Where files cannot be locked, the process that is named there counts for as long as it runs.
    return holder if locked is False or process.is_running(holder.name) else None


def _find_holder(directory: Path, other_user: Holder | None = None) -> Holder | None:
    """Return the process that has the lock, or `other_user` if this one may not ask."""
    try:
        with (directory / LOCK_FILE).open("r+") as lock:
            return _holder(lock)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in process.READ_ONLY:
            raise
        return other_user


def shipper_process(directory: Path) -> Holder | None:
    """Return the directory's living shipper, or None."""
    for _ in range(NAMING_POLLS):
        holder = _find_holder(directory)
        if holder is None or holder.pid:
            break
        time.sleep(SHIPPER_POLL_SECONDS)  # it has yet to write its name
    return holder


def say(message: str) -> None:
    """Write a line with the time to the shipper's log, unless the disk is full."""
    with contextlib.suppress(OSError):
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}", flush=True)


def read_state(directory: Path) -> dict[str, Any]:
    """Return what the shipper last published: sessions, checkpoints, error; empty if nothing."""
    with contextlib.suppress(OSError, ValueError):
        state = json.loads((directory / STATE_FILE).read_bytes())
        return state if isinstance(state, dict) else {}
    return {}


def write_state(directory: Path, state: str, content: dict[str, Any]) -> None:
    """Publish how far the process is that sends this directory, for `read_state`."""
    content = {"state": state, "pid": os.getpid(), **content, "updated": time.time()}
    with contextlib.suppress(OSError):  # a full disk stops no shipping
        process.write_whole(directory / STATE_FILE, json.dumps(content).encode(), durable=False)


def failed_checkpoints(directory: Path) -> dict[str, str]:
    """Return the staged checkpoints that can never be published as they are, with the reasons."""
    found, states = dict[str, str](), read_state(directory).get("checkpoints", {})
    for name in checkpoints.staged_names(directory):
        state = states.get(name, {})
        reason = state.get("error") if state.get("state") == "failed" else None
        if reason := reason or checkpoints.staged_change(directory, name):
            found[name] = str(reason)
    return found


def start_shipper(directory: Path, *, url: str | None = None) -> None:
    """Start a shipper that outlives this process; if there is one already, it ends soon.

    It inherits the environment, so the token and, unless `url` is given, the server's address.
    """
    import subprocess

    package = Path(__file__).resolve().parents[3]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if url is not None:
        environment["ENDLEX_URL"] = url
    shipper = [sys.executable, "-P", "-m", "endlex.client.shipper", str(directory)]
    with (directory / LOG_FILE).open("ab") as log:
        subprocess.run(  # by a shell that ends at once: then it is not our child
            ["/bin/sh", "-c", '"$@" &', "sh", *shipper],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            check=True,
            env=environment,
        )


def restart_shipper_if_killed(directory: Path) -> None:
    """Start a shipper unless one lives, or the last one was asked to end.

    Where the lock is another user's, shippers work without it (`take_lock`): nothing tells whether
    one lives, so none is started. `log` does this once a minute: it takes tens of microseconds.
    """
    holder = _find_holder(directory, other_user=Holder(0, BACKGROUND, ""))
    # The state is read after the lock: a shipper that ends publishes it before it frees the lock.
    if holder is None and read_state(directory).get("state") != STOPPED:
        start_shipper(directory)


def stop_shipper(directory: Path, *, seconds: float = 5.0) -> bool:
    """End the directory's background shipper, and return whether there was one.

    It raises an `EndlexError` if that is an `endlex sync`, or is on another machine or in another
    container, where its process id means nothing here.
    """
    had_one, told, deadline = False, 0, time.monotonic() + seconds
    while (found := shipper_process(directory)) is not None:
        had_one, (pid, kind, name) = True, found
        who = process.describe(name)
        if kind == FOREGROUND:
            raise EndlexError(f"{who} sends {directory} already: wait for it, or end it")
        if pid and not process.is_running(name):
            if shipper_process(directory) == found:  # else it has just ended
                raise EndlexError(f"{who} sends {directory}: wait for it, or end it there")
            continue
        late = time.monotonic() - deadline
        if late > seconds:
            raise EndlexError(f"{who}, which sends {directory}, does not end: end it")
        if pid and (pid != told or late > 0):  # the next may have waited for the one before
            told = pid
            with contextlib.suppress(ProcessLookupError):  # nothing is lost by a kill
                os.kill(pid, signal.SIGTERM if late <= 0 else signal.SIGKILL)
        time.sleep(SHIPPER_POLL_SECONDS)
    return had_one


class Unsent(NamedTuple):
    """How much the server has not acknowledged yet; `files` are of checkpoints and media."""

    records: int
    bytes: int
    files: int


def unsent(directory: Path) -> Unsent:
    """Return what the server has not acknowledged, as far as this side knows."""
    records = size = 0
    for path in session_files(directory):
        with path.open("rb") as file:
            file.seek(_acknowledged(directory, path))
            for line in file:
                if line.endswith(b"\n"):
                    records, size = records + 1, size + len(line)
    return Unsent(records, size, _count_files(directory))


def _acknowledged(directory: Path, journal: Path) -> int:
    session = read_state(directory).get("sessions", {}).get(journal.stem, {})
    return int(session.get("acknowledged", 0))


def _count_files(directory: Path) -> int:
    """Return how many files of checkpoints and media wait, and can be sent."""
    files = len(checkpoints.waiting_media(directory))
    for name in set(checkpoints.staged_names(directory)) - set(failed_checkpoints(directory)):
        try:
            files += len(checkpoints.read_note(directory, name)["files"])
        except EndlexError:  # the shipper says what is wrong with it
            files += 1
    return files


def sync_command(directory: Path) -> str:
    """Return what to type to send the rest."""
    return f"endlex sync {shlex.quote(str(directory))}"


def wait_until_shipped(directory: Path, journal: Path) -> None:
    """Wait until the server has a session that just ended, or say what it lacks."""
    began, end, left = time.monotonic(), content_length(journal), Unsent(0, 0, 0)
    # A short run's shipper may be about to begin: a second one would only follow it.
    restart_after = min(BEGIN_SECONDS, FINISH_SECONDS)
    while _acknowledged(directory, journal) < end or _count_files(directory):
        waited = time.monotonic() - began
        if waited >= restart_after:
            restart_after = math.inf
            restart_shipper_if_killed(directory)
        if waited >= FINISH_SECONDS:
            left = unsent(directory)
            break
        time.sleep(SHIPPER_POLL_SECONDS)
    for name, reason in failed_checkpoints(directory).items():
        process.warn(f"checkpoint {name} cannot be sent: {reason}")
    for sha256 in checkpoints.damaged_media(directory):
        where = f"{MEDIA_DIR}/{sha256}{checkpoints.DAMAGED}"
        process.warn(f"a logged file was damaged before it was sent: {where}")
    if any(left):
        error = read_state(directory).get("error")
        process.warn(
            f"{left.records:,} records ({left.bytes:,} bytes) and {left.files:,} files of "
            f"checkpoints and pictures are not on the server yet{f' ({error})' if error else ''}. "
            f"The shipper keeps trying; to send them later: {sync_command(directory)}"
        )
