"""Move things while somebody waits: `endlex sync`, `endlex push`, `endlex pull`.

A sync sends all that a run's directory holds. A shipper that is at work there is ended first, and
started again afterwards if a trainer still writes; so a new address or token counts at once.

The ranges of a pull come in parallel; each is verified, and a file appears whole or not at all.
Files are built in a hidden directory beside the target. What an attempt that was cut left there is
hashed part by part, and only the rest is asked for. Ctrl-C loses nothing of any of them.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from endlex.client import checkpoints
from endlex.client.directories import require_run_file
from endlex.client.process import fsync
from endlex.client.shipper import control, send_checkpoints
from endlex.client.shipper.send_checkpoints import CheckpointShipper, Progress
from endlex.client.shipper.send_journals import JournalShipper, SessionShipper
from endlex.client.transport import Backoff, Retry, Transport, quoted
from endlex.client.verify import fetch_manifest
from endlex.protocol import EndlexError, ManifestFile, Part, check_checkpoint_name, check_run_id
from endlex.reading import content_length, session_files, writer_is_alive

CONNECTIONS = 4
LOCK_SECONDS = 1.0
ATTEMPTS = 3
PATIENCE_SECONDS = 60.0  # without any progress, after which a fault of the network is raised

T = TypeVar("T")
SyncProgress = Callable[[str, int, int], None]
"""Called with what is sent ("journal" or a checkpoint), the bytes that have arrived, all bytes."""


class Patience:
    """Try again after faults of the network, a few times, until nothing got further for a while."""

    def __init__(self, progress: Callable[..., None] = lambda *_: None) -> None:
        self._progress = progress
        self._start_over()

    def _start_over(self, *reached: Any) -> None:
        self._reached = reached
        self._backoff, self._deadline, self._faults = Backoff(longest=5.0), math.inf, 0

    def report(self, *arguments: Any) -> None:
        """Call `progress`, whose last argument is a total; start over if the others changed."""
        if self._reached != arguments[:-1]:
            self._start_over(*arguments[:-1])
        self._progress(*arguments)

    def keep_trying(self, act: Callable[[], T]) -> T:
        """Return what `act` returns, after as many faults as there is patience for."""
        while True:
            try:
                return act()
            except Retry as error:
                seconds, now = self._backoff.wait(error), time.monotonic()
                self._deadline = min(self._deadline, now + PATIENCE_SECONDS)
                self._faults += 1
                if self._faults >= ATTEMPTS and now + seconds > self._deadline:
                    raise
                time.sleep(seconds)


def sync_directory(
    directory: Path,
    transport: Transport,
    progress: SyncProgress = lambda what, done, total: None,
    *,
    drop_failed: bool = False,
    resend: bool = False,
) -> set[str]:
    """Send what is there now, and wait until the server has acknowledged and published it.

    The published checkpoints are returned: a directory that can only be read still holds them.

    Args:
        drop_failed: give up the checkpoints and media that can never be sent.
        resend: send journals that differ from the server's copies as new sessions.

    Raises:
        EndlexError: the directory is no run's, another `endlex sync` is at work there, the server
            refuses something, or a checkpoint can never be published. The rest is sent first.
        Retry: the server could not be reached for too long.
    """
    run = require_run_file(directory)["run"]
    had_shipper, lock = _take_over(directory)
    journals = JournalShipper(directory, run, transport)
    shipper = CheckpointShipper(directory, run, transport)
    waiter = Patience(progress)
    try:
        with control.holding(lock):
            try:
                if resend:
                    journals.renew_differing()
                _send_journals(directory, journals, waiter)
                _send_checkpoints(directory, shipper, waiter, drop_failed)
            finally:
                states = {"sessions": journals.states(), "checkpoints": shipper.states}
                content = {"url": transport.url, "error": None, **states}
                control.write_state(directory, control.DONE, content)
    finally:
        if had_shipper and journals.has_live_trainer():
            control.start_shipper(directory, url=transport.url)
    if errors := journals.errors() + shipper.errors():
        raise EndlexError("; ".join(dict.fromkeys(errors)))
    return {name for name, state in shipper.states.items() if state["state"] == "published"}


def _take_over(directory: Path) -> tuple[bool, IO[str]]:
    """Return whether a shipper had to give up the directory's lock, and the lock."""
    had_shipper = False
    for _ in range(ATTEMPTS):  # another one may have waited for the first
        had_shipper |= control.stop_shipper(directory)
        lock = control.take_lock(directory, control.FOREGROUND, seconds=LOCK_SECONDS)
        if lock is not None:
            return had_shipper, lock
    raise EndlexError(f"another process sends {directory} already: wait for it, or end it")


def _send_journals(directory: Path, journals: JournalShipper, patience: Patience) -> None:
    """Send every journal up to where it ends now."""
    targets = {path.stem: content_length(path) for path in session_files(directory)}

    def is_sent(session: SessionShipper) -> bool:
        """Whether the server has what was there, and of a session that is over how it ended."""
        has_all = (session.acknowledged or 0) >= targets.get(session.session, 0)
        return bool(session.error or session.done or (has_all and writer_is_alive(session.path)))

    while True:
        patience.keep_trying(journals.tick)
        sessions = journals.sessions.values()
        done = sum(session.acknowledged or 0 for session in sessions)
        patience.report("journal", done, max(done, sum(targets.values())))
        if all(map(is_sent, sessions)):
            return


def _send_checkpoints(
    directory: Path, shipper: CheckpointShipper, patience: Patience, drop_failed: bool
) -> None:
    checkpoints.drop_replaced(directory)
    for name in shipper.waiting():
        try:
            patience.keep_trying(partial(shipper.send, name, partial(patience.report, name)))
        except Retry:
            raise
        except checkpoints.CheckpointFailed as error:
            if drop_failed:
                del shipper.states[name]
                if name != send_checkpoints.ALL_MEDIA:
                    checkpoints.give_up(directory, name, str(error))
        except (EndlexError, OSError):
            continue  # it is among the states
    for sha256 in checkpoints.damaged_media(directory) if drop_failed else ():
        checkpoints.give_up(directory, sha256, "damaged before it was sent")


def push_checkpoint(
    run: str,
    source: Path,
    name: str,
    transport: Transport,
    *,
    step: int = 0,
    aliases: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
) -> None:
    """Upload a file, or a directory's files, as a checkpoint of a run that the server knows.

    Nothing is staged: the files must not change meanwhile, which is noticed.

    Raises:
        Retry: not now; calling again sends only what is left.
        EndlexError: there is nothing to push, a name is not one or taken, or the server refuses.
    """
    check_run_id(run)
    states = [(inside, path.stat()) for inside, path in checkpoints.files_of(source)]
    if not states:
        raise EndlexError(f"{str(source)!r} holds no files: nothing to push")
    note: checkpoints.Staged = {
        "name": check_checkpoint_name(name),
        "step": step,
        # That of the newest file, not now, so that the same push again is the same manifest.
        "created": max(state.st_mtime for _, state in states),
        "aliases": [check_checkpoint_name(alias) for alias in aliases],
        "metadata": {},
        "files": [checkpoints.describe_file(*state) for state in states],
    }
    root = source if source.is_dir() else source.parent
    manifest, patience = checkpoints.build_manifest(root, note), Patience(progress)
    uploader = send_checkpoints.Uploader(transport, patience.report)
    patience.keep_trying(lambda: uploader.publish(run, manifest, root, note))


_Piece = tuple[str, int, Part]  # a file's path, an offset in it, and the part that is there


def pull_checkpoint(
    run: str,
    name: str,
    directory: Path,
    transport: Transport,
    progress: Progress = lambda done, total: None,
) -> list[Path]:
    """Download a checkpoint into a directory; return its files, each whole and verified.

    The directory is made if missing. A file that is there already is kept if it is the same.

    Raises:
        EndlexError: there is no such checkpoint, another file is in the way, or what the server
            sends does not have the hashes that it should.
        Retry: the server could not be reached for too long; call again to resume.
    """
    directory = directory.absolute()
    manifest, let_go = fetch_manifest(run, name, transport)
    if let_go is not None:
        gone = f"checkpoint {name!r} of run {run} is no longer on the server: {let_go.reason}"
        raise EndlexError(gone)
    wanted = [file for file in manifest["files"] if not _is_there(directory, file)]
    building = directory.parent / f".{directory.name}.{name}.partial"
    pieces = [piece for file in wanted for piece in _pieces(building, file)]
    total = sum(file["bytes"] for file in manifest["files"])
    done = total - sum(part["bytes"] for _, _, part in pieces)
    waiter = Patience(progress)
    waiter.report(done, total)
    where, lock = quoted("runs", run, "checkpoints", name), threading.Lock()

    def fetch(piece: _Piece) -> None:
        nonlocal done
        waiter.keep_trying(lambda: _fetch(piece, building, where, transport))
        with lock:
            done += piece[2]["bytes"]
            waiter.report(done, total)

    send_checkpoints.in_parallel(fetch, pieces, CONNECTIONS, transport)
    for file in wanted:
        _publish(building / file["path"], directory / file["path"], file)
    shutil.rmtree(building, ignore_errors=True)
    return [directory / file["path"] for file in manifest["files"]]


def _is_there(directory: Path, file: ManifestFile) -> bool:
    path = directory / file["path"]
    if not path.exists():
        return False
    if path.is_file() and path.stat().st_size == file["bytes"] and _hash(path) == file["sha256"]:
        return True
    raise EndlexError(f"{path} is there already and differs: move it, or give another directory")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pieces(building: Path, file: ManifestFile) -> Iterator[_Piece]:
    """Make room for a file, and yield the parts of it that are not there yet."""
    path, offset = building / file["path"], 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+b" if path.exists() else "w+b") as content:
        content.truncate(file["bytes"])
        for part in file["parts"]:
            if hashlib.sha256(content.read(part["bytes"])).hexdigest() != part["sha256"]:
                yield file["path"], offset, part
            offset += part["bytes"]


def _fetch(piece: _Piece, building: Path, where: str, transport: Transport) -> None:
    path, offset, part = piece
    source, end = f"{where}/files{quoted(*path.split('/'))}", offset + part["bytes"]
    digest, held = hashlib.sha256(), 0
    with (building / path).open("r+b") as file:
        file.seek(offset)
        with transport.download(source, start=offset, end=end) as blocks:
            for block in blocks:
                held += len(block)
                if held > part["bytes"]:
                    break
                digest.update(block)
                file.write(block)
    if held != part["bytes"] or digest.hexdigest() != part["sha256"]:
        raise Retry(f"{transport.url} sent something else than part {part['sha256']} of {source}")


def _publish(source: Path, target: Path, file: ManifestFile) -> None:
    if _hash(source) != file["sha256"]:
        raise EndlexError(f"{file['path']!r} came with the wrong hash: pull it again")
    with source.open("rb") as content:
        fsync(content.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
