"""The journal's one writer: a record is a line, and a line is one `os.write`.

A journal is an append-only file of JSON lines, the only truth about a run. Each recording process
opens its own, one session, and holds its lock (`flock`) while it lives, so that others see when it
is gone. The file is opened with O_APPEND, and appears under its name with its lock held and its
first record written. There is no thread, no queue and no network here. The process may be killed at
any moment: what was written stays, and at most the last line is torn. `endlex.reading` reads.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from endlex.client.process import FULL, fsync, try_lock, warn, warn_once
from endlex.client.values import to_json
from endlex.protocol import FINISH, JOURNAL_DIR, MAX_BATCH_BYTES, SESSION, TEXT, EndlexError
from endlex.reading import session_files, session_number

LARGEST_BACKLOG = 16 * 2**20
"""Bytes of records held in memory while the disk refuses them."""

OPENED: weakref.WeakSet[Journal] = weakref.WeakSet()
"""The journals of this process, which a forked child must abandon."""


class Journal:
    """Append records to a new file of a run's directory, as one session.

    A full disk does not stop the trainer at once: what could not be written is kept in memory,
    with one warning, and goes out before the next record. In a forked child the journal is shut:
    it belongs to the parent.

    Args:
        directory: the run's; made if missing.
        start: of the first record, without `type`, `session`, `seq` and `time`.
        session: its id, for a journal that an importer makes; a new one if not given.
        moment: of the first record, likewise.
    """

    def __init__(
        self,
        directory: Path,
        start: Mapping[str, Any],
        *,
        session: str | None = None,
        moment: float | None = None,
    ) -> None:
        folder = directory / JOURNAL_DIR
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((session_number(path) for path in session_files(directory)), default=0)
        self.session = session or f"{number:06d}-{os.urandom(6).hex()}"
        self.path = folder / f"{self.session}.jsonl"
        self.number = session_number(self.path)
        self.inherited = False
        self._heads: dict[str, str] = {}
        self._numbers = itertools.count()
        self.lock = threading.RLock()
        """Held while a record is written. A signal handler may log in the middle of that."""
        self.count = 0
        """How many records were appended."""
        self._backlog = b""
        self._warned = False
        hidden = folder / f".{self.session}.new"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        self._descriptor = os.open(hidden, flags, 0o644)
        try_lock(self._descriptor)
        self.append(SESSION, start, moment)
        hidden.rename(self.path)
        _watch_forks()
        OPENED.add(self)

    def append(self, kind: str, content: Mapping[str, Any], moment: float | None = None) -> None:
        """Write one record; when this returns, killing the process does not lose it.

        Args:
            kind: the record's type (`protocol.TEXT` and so on).
            content: the rest of it; what JSON cannot hold is stored as its `str`, and non-finite
                floats as `protocol` says.
            moment: when it was, in Unix seconds; now if not given.

        Raises:
            EndlexError: the record is too large to be sent. Nothing is written.
            OSError: the disk has refused more than `LARGEST_BACKLOG` bytes; this record is lost.
        """
        self.append_members(kind, f",{to_json(content)[1:-1]}" if content else "", moment)

    def append_own(self, name: str, text: str, step: int | None = None) -> None:
        """Record a text of Endlex's own; its step is the session's number, if not given."""
        step = self.number if step is None else step
        self.append(TEXT, {"step": step, "name": name, "text": text})

    def append_members(self, kind: str, members: str, moment: float | None = None) -> None:
        """Do what `append` does for content that is already JSON: `,"key":value` for each."""
        head = self._heads.get(kind)
        if head is None:
            head = self._heads[kind] = f'{{"type":"{kind}","session":"{self.session}","seq":'
        if len(members) > MAX_BATCH_BYTES // 4:  # else it is short enough however it is encoded
            size = len(members.encode(errors="replace")) + len(head) + 100
            if size > MAX_BATCH_BYTES:
                raise EndlexError(
                    f"a {kind} record of {size:,} bytes is larger than {MAX_BATCH_BYTES:,}: log "
                    "less at once"
                )
        if self.inherited:
            if kind != FINISH:
                warn_once("this process was forked from the one that records: it records nothing")
            return
        with self.lock:
            number = next(self._numbers)
            moment = time.time() if moment is None else moment
            line = f'{head}{number},"time":{moment!r}{members}}}\n'
            self._write(line.encode(errors="replace"))
            self.count = max(self.count, number + 1)

    def _write(self, record: bytes) -> None:
        if self._descriptor < 0:
            return  # a signal handler finished the run in the middle of this
        waiting, self._backlog = self._backlog, b""
        content = waiting + record if waiting else record
        try:
            written = os.write(self._descriptor, content)
        except OSError as error:
            is_lost = len(content) > LARGEST_BACKLOG
            self._backlog = (waiting if is_lost else content) + self._backlog
            self._warn(error)
            if is_lost:
                raise
        else:
            self._backlog = content[written:] + self._backlog

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            remedy = ": free some space" if error.errno in FULL else ""
            warn(
                f"cannot write {self.path} ({error.strerror}); keeping records in memory and "
                f"trying again with each new one{remedy}"
            )

    def close(self) -> None:
        """Put everything on the disk and close the file; a second call does nothing.

        Raises:
            OSError: records that the disk refused are lost.
        """
        with self.lock:
            if self._descriptor < 0:
                return
            descriptor, self._descriptor = self._descriptor, -1
            try:
                while self._backlog:
                    self._backlog = self._backlog[os.write(descriptor, self._backlog) :]
                fsync(descriptor)
            finally:
                os.close(descriptor)

    def abandon(self) -> None:
        """Give up the file in a forked child: the parent keeps it, and its lock."""
        self.lock = threading.RLock()  # a thread that no longer exists may have held the old one
        self.inherited = True
        self._backlog = b""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_abandon_all)


def _abandon_all() -> None:
    for journal in list(OPENED):
        journal.abandon()
