"""The journal: append-only files of JSON lines, the only truth about a run.

Each process that records opens its own file, one session, and holds its lock (`flock`) while it
lives, so that others see when it is gone. `journal_writer` writes a record, one line, at once: a
process may be killed at any moment, what was written stays, and at most the last line is torn. What
follows the last line end is not content: it is neither read nor shipped. All that is here reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from endlex.client.disk import try_lock
from endlex.client.process import is_running
from endlex.protocol import (
    CRASHED,
    FINISH,
    JOURNAL_DIR,
    MAX_BATCH_BYTES,
    METRICS,
    NON_FINITE,
    SESSION_ID,
    STATUSES,
    SYSTEM,
    EndlexError,
)


def session_files(directory: Path) -> list[Path]:
    """The journals of a run's directory, in the order in which their sessions began."""
    found = [
        path
        for path in (directory / JOURNAL_DIR).glob("*.jsonl")
        if SESSION_ID.fullmatch(path.stem)
    ]
    return sorted(found, key=lambda path: (session_number(path), path.stem))


def session_number(path: Path) -> int:
    """The number that a session's id begins with; 0 if it has none."""
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


def read_run(directory: Path | str) -> Iterator[dict[str, Any]]:
    """Yield a run's records as `endlex.protocol` describes them, session after session.

    The values of metrics are numbers, NaN and infinities too. A directory without journals yields
    nothing.

    Raises:
        EndlexError: as `read_journal`.
        OSError: a file cannot be read.
    """
    for path in session_files(Path(directory)):
        for record in read_journal(path):
            values = record.get("values")
            if record["type"] == METRICS and isinstance(values, dict):
                for name in [name for name, value in values.items() if isinstance(value, str)]:
                    values[name] = NON_FINITE.get(values[name], values[name])
            yield record


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


def last_step(directory: Path) -> int:
    """The last step that a run's trainers logged metrics of, or -1."""
    for path in reversed(session_files(directory)):
        if session_kind(path) == SYSTEM:
            continue  # whose steps are seconds
        for record in iter_last_records(path):
            if record["type"] == METRICS and isinstance(record.get("step"), int):
                return int(record["step"])
    return -1


def end_status(path: Path) -> str | None:
    """How the session says that it ended, or None if it has not said."""
    last = next(iter_last_records(path, 4096), {})
    ended = last.get("type") == FINISH and last.get("status") in STATUSES
    return str(last["status"]) if ended else None


def gone_status(path: Path) -> str:
    """What to say of a session whose writer is gone without having said how it ended.

    An import's first record says it in `ended`. A shipper that was killed is no fault of the run's.
    """
    begun = first_record(path) or {}
    ended = begun.get("ended")
    if ended in STATUSES:
        return str(ended)
    return "interrupted" if begun.get("kind") == SYSTEM else CRASHED


def writer_is_alive(path: Path) -> bool:
    """Whether the process that writes this journal still runs on this machine."""
    with path.open("rb") as file:
        locked = try_lock(file, shared=True)
    if locked is None:  # no locks here: ask for the process instead
        return is_running((first_record(path) or {}).get("process"))
    return not locked
