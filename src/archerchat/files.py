"""Durable files: writes that appear whole or not at all, locks, hashes.

Files are written under a temporary name, fsynced and renamed. A writer holds a lock on its
temporary entry; the system releases it when the process dies, so an entry without a lock is a
leftover. What a file system does not offer (locks on Lustre, fsync of directories on CIFS,
permissions on exFAT) is skipped, with one warning.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from archerchat.errors import ArcherChatError, DataError, UsageError

TEMPORARY = ".tmp"
STALE = ".stale" + TEMPORARY
"""Ends the name under which the old content waits while a directory is replaced."""
TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
"""Errors of `flock` if another process has the lock; others mean that locks are not offered."""
NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
FULL = (errno.ENOSPC, errno.EDQUOT)
ELSEWHERE = "point ARCHERCHAT_HOME at another disk"


@cache
def _warn_once(what: str, reason: str) -> None:
    print(f"this file system cannot {what} ({reason}); continuing without it", file=sys.stderr)


def _if_offered(what: str, request: Callable[[], None]) -> None:
    """Ask the file system for something, and continue if it does not offer it."""
    try:
        request()
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        _warn_once(what, str(error.strerror))


def fsync(descriptor: int) -> None:
    """Write an open file or directory to the disk, if the file system can."""
    _if_offered("write to the disk on request", lambda: os.fsync(descriptor))


def fsync_path(path: Path) -> None:
    """Write a file to the disk, or the names in a directory."""
    with _opened(path) as descriptor:
        fsync(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open entry until it is closed; False if another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            return False
        _warn_once("lock files", str(error.strerror))
    return True


@contextlib.contextmanager
def _opened(entry: Path) -> Iterator[int]:
    """Yield a descriptor of a file or directory, to lock it or write it to the disk."""
    descriptor = os.open(entry, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Reserve `directory` for this process; a UsageError if another process has it.

    It is created if missing, and removed if the block leaves it empty.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with _opened(directory) as descriptor:
            if not _lock(descriptor):
                raise UsageError(
                    f"another process is using {directory}: wait for it, or choose another name"
                )
            yield
    finally:
        with contextlib.suppress(OSError):
            directory.rmdir()


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file `path` atomically and durably; an OSError leaves it untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(TEMPORARY, f".{path.name}.", path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _lock(file.fileno())
            file.write(content)
            file.flush()
            fsync(file.fileno())
        _if_offered("set permissions", lambda: temporary.chmod(0o644))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinities are refused."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory that becomes `path` when the block succeeds.

    Everything in it is fsynced before the rename. When the block raises, `path` is untouched. An
    existing `path` is replaced: for an instant the old one has only the name that `current` knows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(TEMPORARY, f".{path.name}.", path.parent))
    stale = path.with_name(f".{path.name}{STALE}")
    try:
        with _opened(temporary) as descriptor:
            _lock(descriptor)
            _if_offered("set permissions", lambda: temporary.chmod(0o755))
            yield temporary
            for entry in (*temporary.rglob("*"), temporary):
                fsync_path(entry)
            if path.exists():
                shutil.rmtree(stale, ignore_errors=True)
                path.replace(stale)
            temporary.replace(path)
    except BaseException:
        if stale.exists() and not path.exists():
            stale.replace(path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(path.parent)
    shutil.rmtree(stale, ignore_errors=True)


@contextlib.contextmanager
def explained_writes(
    path: Path, kind: type[ArcherChatError] = DataError, remedy: str = ELSEWHERE
) -> Iterator[None]:
    """Turn the system's error about writing `path` into one with a remedy."""
    try:
        yield
    except OSError as error:
        space = "free some space, or " if error.errno in FULL else ""
        raise kind(f"cannot write {path} ({error.strerror or error}): {space}{remedy}") from error


def current(path: Path) -> Path:
    """Return `path`, or the place of its content if a process was killed while replacing it."""
    stale = path.with_name(f".{path.name}{STALE}")
    return stale if stale.exists() and not path.exists() else path


def remove_directory(path: Path) -> None:
    """Delete a directory; if the process is killed meanwhile, the name is free anyway."""
    doomed = path.with_name(f".{path.name}.removed{TEMPORARY}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.replace(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Undo unfinished replacements, and remove temporary entries that no process still writes."""
    for entry in directory.glob(f".*{TEMPORARY}"):
        replaced = directory / entry.name.removeprefix(".").removesuffix(STALE)
        if entry.name.endswith(STALE) and not replaced.exists():
            entry.replace(replaced)
            continue
        with contextlib.suppress(OSError), _opened(entry) as descriptor:
            free = _lock(descriptor)
            if free and entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif free:
                entry.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_ends(*paths: Path) -> str:
    """Return a short hash of files' sizes and of their first and last MiB: fast for shards."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "big"))
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()[:12]


UNREADABLE = (OSError, ValueError, RecursionError)
"""What reading a JSON file that somebody else wrote can raise."""


def recall(path: Path) -> dict[str, Any]:
    """Return the values that `remember` kept in a file; none if it cannot be read."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (*UNREADABLE, TypeError):
        return {}


def remember(path: Path, key: str, value: Any) -> None:
    """Keep a JSON value in a file; does nothing if the file cannot be written."""
    with contextlib.suppress(OSError):
        write_json(path, recall(path) | {key: value})
