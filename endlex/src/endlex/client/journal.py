"""The journal: append-only files of JSON lines, the only truth about a run.

Each process that records opens its own file, one session, and holds its lock (`flock`) while it
lives, so that others see when it is gone. A record is one line and one `os.write` to a file opened
with O_APPEND: a process may be killed at any moment, what was written stays, and at most the last
line is torn. What follows the last line end is not content: it is neither read nor shipped. A
file appears under its name with its lock held and its first record written. There is no thread,
no queue and no network here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from endlex.protocol import (
    FINISH,
    JOURNAL_DIR,
    MAX_BATCH_BYTES,
    SESSION,
    SESSION_ID,
    STATUSES,
    EndlexError,
    encode_number,
)

if sys.platform != "win32":
    import fcntl

LARGEST_BACKLOG = 16 * 2**20
"""Bytes of records held in memory while the disk refuses them."""

ENCODER = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=str)
OPENED: weakref.WeakSet[Journal] = weakref.WeakSet()
"""Those of this process, for a fork to let go of; empty until one is opened."""


class Journal:
    """Append records to a new file of a run's directory, as one session.

    A full disk does not stop the trainer at once: what could not be written is kept in memory,
    with one warning, and goes out before the next record. In a forked child the journal is shut:
    it belongs to the parent.

    Args:
        directory: the run's; made if missing.
        start: of the first record, without `type`, `session`, `seq` and `time`.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, directory: Path, start: Mapping[str, Any]) -> None:
        folder = directory / JOURNAL_DIR
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((_number(path) for path in session_files(directory)), default=0)
        self.session = f"{number:06d}-{os.urandom(6).hex()}"
        self.path = folder / f"{self.session}.jsonl"
        self.inherited = False
        self._heads: dict[str, str] = {}
        self._seq = 0
        self._lock = threading.Lock()
        self._backlog = b""
        self._warned = False
        hidden = folder / f".{self.session}.new"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        self._descriptor = os.open(hidden, flags, 0o644)
        _lock(self._descriptor)
        self.append(SESSION, start)
        hidden.rename(self.path)
        _watch_forks()
        OPENED.add(self)

    @property
    def count(self) -> int:
        """How many records were appended."""
        return self._seq

    def append(self, kind: str, content: Mapping[str, Any]) -> None:
        """Write one record; when this returns, killing the process does not lose it.

        Args:
            kind: the record's type (`protocol.TEXT` and so on).
            content: the rest of it; what JSON cannot hold is stored as its `str`, and non-finite
                floats as `protocol` says.

        Raises:
            EndlexError: the record is too large to be sent. Nothing is written.
            OSError: the disk has refused more than `LARGEST_BACKLOG` bytes.
        """
        self.append_members(kind, f",{to_json(content)[1:-1]}" if content else "")

    def append_members(self, kind: str, members: str) -> None:
        """Do what `append` does for content that is already JSON: `,"key":value` for each."""
        head = self._heads.get(kind)
        if head is None:
            head = self._heads[kind] = f'{{"type":"{kind}","session":"{self.session}","seq":'
        with self._lock:
            line = f'{head}{self._seq},"time":{time.time()!r}{members}}}\n'
            content = line.encode(errors="replace")
            if len(content) > MAX_BATCH_BYTES:
                raise EndlexError(
                    f"a {kind} record of {len(content):,} bytes is larger than {MAX_BATCH_BYTES:,}"
                    ": log less at once"
                )
            if self.inherited:
                return
            self._seq += 1
            self._write(self._backlog + content if self._backlog else content)

    def _write(self, content: bytes) -> None:
        try:
            written = os.write(self._descriptor, content)
        except OSError as error:
            self._backlog = content
            self._warn(error)
            if len(content) > LARGEST_BACKLOG:
                raise
        else:
            self._backlog = content[written:]

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            print(
                f"endlex: cannot write {self.path} ({error.strerror}); keeping records in memory "
                "and trying again with each new one: free some space",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Put everything on the disk and close the file; a second call does nothing.

        Raises:
            OSError: records that the disk refused are lost.
        """
        with self._lock:
            if self._descriptor < 0:
                return
            descriptor, self._descriptor = self._descriptor, -1
            try:
                while self._backlog:
                    self._backlog = self._backlog[os.write(descriptor, self._backlog) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def abandon(self) -> None:
        """Let go of the file in a forked child: the parent keeps it, and its lock."""
        self._lock = threading.Lock()  # a thread that no longer exists may have held the old one
        self.inherited = True
        self._backlog = b""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_abandon_all)


def _abandon_all() -> None:
    for journal in list(OPENED):
        journal.abandon()


def _lock(descriptor: int) -> None:
    """Lock a new file; some network file systems cannot, and `writer_is_alive` copes."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def to_json(content: Mapping[str, Any]) -> str:
    """Return `content` as JSON on one line, whatever it holds."""
    try:
        return ENCODER.encode(content)
    except ValueError:  # rare, so only then is every value looked at
        return ENCODER.encode(_finite(content))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return encode_number(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def session_files(directory: Path) -> list[Path]:
    """The journals of a run's directory, in the order in which their sessions began."""
    found = [
        path
        for path in (directory / JOURNAL_DIR).glob("*.jsonl")
        if SESSION_ID.fullmatch(path.stem)
    ]
    return sorted(found, key=lambda path: (_number(path), path.stem))


def _number(path: Path) -> int:
    number = path.stem.partition("-")[0]
    return int(number) if number.isdecimal() else 0


def content_length(path: Path) -> int:
    """Bytes of a journal up to its last line end; what follows is torn, or not yet written."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of one session, oldest first, without changing them.

    Raises:
        EndlexError: a line before the last line end is damaged; the message gives its number.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            record = parse_record(line)
            if record is None:
                raise EndlexError(
                    f"{path}, line {number} is not a record: the file was altered, or the disk is "
                    "failing"
                )
            yield record


def read_run(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of all sessions of a run's directory, in the order of `session_files`.

    Raises:
        EndlexError: as `read_journal`.
        OSError: a file cannot be read.
    """
    for path in session_files(directory):
        yield from read_journal(path)


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record of one line, or None if it is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "type" in record else None


def first_record(path: Path) -> dict[str, Any] | None:
    """The record that says whose session this is, or None while it is not written."""
    with path.open("rb") as file:
        line = file.readline(MAX_BATCH_BYTES)
    return parse_record(line) if line.endswith(b"\n") else None


def session_kind(path: Path) -> str:
    """What wrote this journal, `TRAINER` or `SYSTEM`; empty while that is not written."""
    return str((first_record(path) or {}).get("kind", ""))


def iter_last_records(path: Path, tail: int = 2**20) -> Iterator[dict[str, Any]]:
    """Yield the records whose lines lie in the last `tail` bytes of a journal, newest first."""
    end = content_length(path)
    with path.open("rb") as file:
        start = file.seek(max(0, end - tail))
        lines = file.read(end - start).splitlines()
    for line in reversed(lines[1:] if start else lines):
        record = parse_record(line)
        if record is not None:
            yield record


def end_status(path: Path) -> str | None:
    """How the session says that it ended, or None if it has not said."""
    last = next(iter_last_records(path, 4096), {})
    ended = last.get("type") == FINISH and last.get("status") in STATUSES
    return str(last["status"]) if ended else None


def writer_is_alive(path: Path) -> bool:
    """Whether the process that writes this journal still runs on this machine."""
    if sys.platform == "win32":
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return True
        else:
            return False
    start = first_record(path) or {}  # no locks here: ask for the process instead
    return start.get("host") == os.uname().nodename and _is_process(start.get("pid"))


def _is_process(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True
