"""Move one checkpoint while somebody waits: from the server (pull), or to it (push).

Ranges come in parallel; each is verified, and a file appears whole or not at all. Files are built
in a hidden directory beside the target. What an attempt that was cut left there is hashed part by
part, and only the rest is asked for.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from endlex.client.checkpoints import Staged, files_of
from endlex.client.process import fsync
from endlex.client.transport import Backoff, Refused, Retry, Transport, quoted
from endlex.client.uploads import Progress, Uploader, build_manifest, in_parallel
from endlex.protocol import (
    REMOVED,
    EndlexError,
    Manifest,
    ManifestFile,
    check_checkpoint_name,
    check_manifest,
    check_run_id,
)

T = TypeVar("T")

CONNECTIONS = 4
PATIENCE_SECONDS = 60.0
LEAST_ATTEMPTS = 3


class Patience:
    """Try again after faults of the network, until nothing has got further for a while.

    The time counts from the first fault after progress, and a few attempts are made however long
    each one takes.
    """

    def __init__(self, seconds: float = PATIENCE_SECONDS) -> None:
        self._seconds = seconds
        self._progress: object = None
        self._start_over()

    def _start_over(self) -> None:
        self._backoff = Backoff(longest=5.0)
        self._deadline = math.inf
        self._faults = 0

    def progressed(self, *progress: object) -> None:
        """Note how far the work is; if that is not where it was, all patience is back."""
        if progress != self._progress:
            self._progress = progress
            self._start_over()

    def watching(self, progress: Callable[..., None], *what: str) -> Callable[[int, int], None]:
        """Return a `progress` that also notes how far the work is, told after `what`."""

        def report(done: int, total: int) -> None:
            self.progressed(*what, done)
            progress(*what, done, total)

        return report

    def keep_trying(self, act: Callable[[], T]) -> T:
        """Return what `act` returns, after as many faults as there is patience for."""
        while True:
            try:
                return act()
            except Retry as error:
                seconds, now = self._backoff.wait(error), time.monotonic()
                self._deadline = min(self._deadline, now + self._seconds)
                self._faults += 1
                if self._faults >= LEAST_ATTEMPTS and now + seconds > self._deadline:
                    raise
                time.sleep(seconds)


@dataclass(frozen=True)
class _Piece:
    """A part in its place."""

    file: ManifestFile
    offset: int
    bytes: int
    sha256: str


class Removed(EndlexError):
    """The server published this checkpoint and removed it since, on purpose.

    Attributes:
        removed: Unix seconds.
        reason: such as "pruned by keep-last 3".
        manifest: what it was.
    """

    def __init__(self, message: str, removed: float, reason: str, manifest: Manifest) -> None:
        super().__init__(message)
        self.removed, self.reason, self.manifest = removed, reason, manifest


class Unknown(EndlexError):
    """The server knows no checkpoint of this name."""


def fetch_manifest(run: str, name: str, transport: Transport) -> Manifest:
    """The manifest of a checkpoint that the server has published.

    Raises:
        Unknown: there is none of this name.
        Removed: a rule or a person removed it.
        EndlexError: it is not published.
        Retry: the server is not there.
    """
    try:
        answer = transport.request("GET", quoted("runs", run, "checkpoints", name))
    except Refused as error:
        if error.status == 404:
            raise Unknown(f"the server has no checkpoint {name!r} of run {run}") from error
        raise
    content = answer.content if isinstance(answer.content, dict) else {}
    state = content.get("state")
    if state not in ("published", REMOVED):
        raise EndlexError(f"checkpoint {name!r} of run {run} is {state!r}, not published yet")
    manifest = check_manifest(content)
    if manifest["name"] != name:
        raise EndlexError(f"the server sent checkpoint {manifest['name']!r} in place of {name!r}")
    if state == REMOVED:
        reason, removed = str(content.get("reason")), content.get("removed")
        removed = float(removed) if isinstance(removed, int | float) else 0.0
        message = f"checkpoint {name!r} of run {run} is no longer on the server: {reason}"
        raise Removed(message, removed, reason, manifest)
    return manifest


def pull_checkpoint(
    run: str,
    name: str,
    directory: Path,
    transport: Transport,
    progress: Progress = lambda done, total: None,
    *,
    patience: float = PATIENCE_SECONDS,
) -> list[Path]:
    """Download a checkpoint's files into a directory; each appears whole and verified.

    Args:
        directory: made if missing. A file that is there already is kept if it is the same.
        progress: called with the bytes that are here and verified, and all bytes.
        patience: seconds without any progress after which a fault of the network is raised.

    Returns:
        The files.

    Raises:
        EndlexError: there is no such checkpoint, another file is in the way, or what the server
            sends does not have the hashes that it should.
        Retry: the server could not be reached for too long; call again to resume.
    """
    directory = directory.absolute()
    manifest = fetch_manifest(run, name, transport)
    wanted = [file for file in manifest["files"] if not _is_there(directory, file)]
    building = directory.parent / f".{directory.name}.{name}.partial"
    pieces = [piece for file in wanted for piece in _pieces(building, file)]
    total = sum(file["bytes"] for file in manifest["files"])
    done = total - sum(piece.bytes for piece in pieces)
    progress(done, total)
    where = quoted("runs", run, "checkpoints", name)
    lock = threading.Lock()
    waiter = Patience(patience)
    report = waiter.watching(progress)

    def fetch(piece: _Piece) -> None:
        nonlocal done
        waiter.keep_trying(lambda: _fetch(piece, building, where, transport))
        with lock:
            done += piece.bytes
            report(done, total)

    in_parallel(fetch, pieces, CONNECTIONS, transport)
    for file in wanted:
        _publish(building, directory, file)
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
    path = building / file["path"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+b" if path.exists() else "w+b") as content:
        content.truncate(file["bytes"])
        offset = 0
        for part in file["parts"]:
            content.seek(offset)
            if hashlib.sha256(content.read(part["bytes"])).hexdigest() != part["sha256"]:
                yield _Piece(file, offset, part["bytes"], part["sha256"])
            offset += part["bytes"]


def _fetch(piece: _Piece, building: Path, where: str, transport: Transport) -> None:
    path = f"{where}/files{quoted(*piece.file['path'].split('/'))}"
    digest, held = hashlib.sha256(), 0
    end = piece.offset + piece.bytes
    with (building / piece.file["path"]).open("r+b") as file:
        file.seek(piece.offset)
        with transport.download(path, start=piece.offset, end=end) as blocks:
            for block in blocks:
                held += len(block)
                if held > piece.bytes:
                    break
                digest.update(block)
                file.write(block)
    if held != piece.bytes or digest.hexdigest() != piece.sha256:
        raise Retry(f"{transport.url} sent something else than part {piece.sha256} of {path}")


def _publish(building: Path, directory: Path, file: ManifestFile) -> None:
    source, target = building / file["path"], directory / file["path"]
    if _hash(source) != file["sha256"]:
        raise EndlexError(f"{file['path']!r} came with the wrong hash: pull it again")
    with source.open("rb") as content:
        fsync(content.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)


def push_checkpoint(
    run: str,
    source: Path,
    name: str,
    transport: Transport,
    *,
    step: int = 0,
    aliases: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Upload a file, or a directory's files, as a checkpoint of a run that the server knows.

    Nothing is staged: the files must not change meanwhile, which is noticed.

    Raises:
        CheckpointFailed: it cannot be published, such as when another one has the name.
        Retry: not now; calling again sends only what is left.
        Refused: the token does not allow it, or the server does not know the run.
        EndlexError: there is nothing to push, or a name is not one.
    """
    check_run_id(run)
    files = list(files_of(source))
    if not files:
        raise EndlexError(f"{str(source)!r} holds no files: nothing to push")
    states = [(inside, path.stat()) for inside, path in files]
    note: Staged = {
        "name": check_checkpoint_name(name),
        "step": step,
        # That of the newest file, not now, so that the same push again is the same manifest.
        "created": max(state.st_mtime for _, state in states),
        "aliases": [check_checkpoint_name(alias) for alias in aliases],
        "metadata": dict(metadata or {}),
        "files": [
            {"path": inside, "bytes": state.st_size, "changed": state.st_mtime_ns}
            for inside, state in states
        ],
    }
    root = source if source.is_dir() else source.parent
    manifest, patience = build_manifest(root, note), Patience()
    uploader = Uploader(transport, patience.watching(progress))
    patience.keep_trying(lambda: uploader.publish(run, manifest, root, note))
