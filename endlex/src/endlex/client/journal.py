"""The journal: an append-only file of JSON lines, the only truth about a run.

A record is one line and one `os.write` to a file opened with O_APPEND, so a process may be killed
at any moment: what was written stays, and at most the last line is torn. The next session ends a
torn line before it writes its own first record, and readers pass over it. There is no thread, no
queue and no network here.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from endlex.protocol import SESSION, EndlexError, encode_number

LARGEST_BACKLOG = 16 * 2**20
"""Bytes of records held in memory while the disk refuses them."""

STRICT = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=str)


class Journal:
    """Append records to one file, as one session.

    A full disk does not stop the trainer at once: what could not be written is kept in memory,
    with one warning, and goes out before the next record.

    Args:
        path: made if missing, together with its directory; never truncated.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.session = os.urandom(6).hex()
        self._seq = 0
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._backlog = b"" if _ends_whole(path) else b"\n"
        self._warned = False

    def append(self, kind: str, content: Mapping[str, Any]) -> None:
        """Write one record; when this returns, killing the process does not lose it.

        Args:
            kind: the record's type (`protocol.SESSION` and so on).
            content: the rest of it; what JSON cannot hold is stored as its `str`, and non-finite
                floats as `protocol` says.

        Raises:
            OSError: the disk has refused more than `LARGEST_BACKLOG` bytes.
        """
        with self._lock:
            record = {"type": kind, "session": self.session, "seq": self._seq, "time": time.time()}
            line = _to_json(record | dict(content)) + b"\n"
            self._seq += 1
            self._write(self._backlog + line)

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


def _ends_whole(path: Path) -> bool:
    """Whether the file is empty or its last line is complete."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _to_json(record: Mapping[str, Any]) -> bytes:
    try:
        text = STRICT.encode(record)
    except ValueError:  # rare, so only then is every value looked at
        text = STRICT.encode(_finite(record))
    return text.encode(errors="replace")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return encode_number(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a journal's records in order, oldest first, without changing them.

    A line is a record once its line end is there. What is torn (at the end of the file, or where
    a later session began) is passed over.

    Raises:
        EndlexError: a line is damaged in another way; the message gives its number.
        OSError: the file cannot be read.
    """
    torn = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            record = _parse(line) if line.endswith(b"\n") else None
            if record is None:
                torn = torn or number
                continue
            if torn and record["type"] != SESSION:
                raise EndlexError(
                    f"{path}, line {torn} is not a record, and no session ended there: the file "
                    "was altered, or the disk is failing"
                )
            torn = 0
            yield record


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "type" in record else None
