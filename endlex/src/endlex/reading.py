"""The one reader of run directories: journals record by record, and a run as a whole.

What follows a journal's last line end is torn, or not written yet: it is neither read nor shipped.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from endlex import protocol
from endlex.client.directories import require_run_file
from endlex.client.process import is_running, try_lock
from endlex.protocol import CHECKPOINT, METRICS, SESSION, SYSTEM, EndlexError


def session_files(directory: Path) -> list[Path]:
    """Return the journals of a run's directory, in the order in which their sessions began."""
    paths = (directory / protocol.JOURNAL_DIR).glob("*.jsonl")
    found = [path for path in paths if protocol.SESSION_ID.fullmatch(path.stem)]
    return sorted(found, key=lambda path: (session_number(path), path.stem))


def session_number(path: Path) -> int:
    """Return the number that a session's id begins with; 0 if it has none."""
    number = path.stem.partition("-")[0]
    return int(number) if number.isdecimal() else 0


def content_length(path: Path) -> int:
    """Return a journal's bytes up to its last line end."""
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
    """Yield the records of one session, oldest first; a damaged line raises an `EndlexError`."""
    for number, (_, record) in enumerate(iter_lines(path), 1):
        if record is None:
            reason = "the file was altered, or the disk is failing"
            raise EndlexError(f"{path}, line {number} is not a record: {reason}")
        yield record


def iter_session(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a session's records; damaged lines are passed over, as the server does."""
    return (record for _, record in iter_lines(path) if record is not None)


def iter_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield the whole lines of a journal, each with its record; None if it is damaged."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line, parse_record(line)


def read_run(directory: Path | str) -> Iterator[dict[str, Any]]:
    """Yield a run's records as `endlex.protocol` describes them, session after session.

    The values of metrics are numbers, NaN and infinities too. A directory without journals yields
    nothing.

    Raises:
        EndlexError: a line is damaged; the message gives its number.
        OSError: a file cannot be read.
    """
    for path in session_files(Path(directory)):
        for record in read_journal(path):
            values = record.get("values")
            if record["type"] == METRICS and isinstance(values, dict):
                words = {name: word for name, word in values.items() if isinstance(word, str)}
                values |= {name: protocol.NON_FINITE.get(w, w) for name, w in words.items()}
            yield record


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return the record of one line, or None if it is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "type" in record else None


def first_record(path: Path) -> dict[str, Any] | None:
    """Return the record that says whose session this is, or None while it is not written."""
    with path.open("rb") as file:
        line = file.readline(protocol.MAX_BATCH_BYTES)
    return parse_record(line) if line.endswith(b"\n") else None


def session_kind(path: Path) -> str:
    """Return the kind of a journal's session, `TRAINER` or `SYSTEM`; empty while it is unknown."""
    return str((first_record(path) or {}).get("kind", ""))


def iter_last_records(path: Path, tail: int = 2**20) -> Iterator[dict[str, Any]]:
    """Yield the records in the last `tail` bytes of a journal, newest first."""
    end = content_length(path)
    with path.open("rb") as file:
        start = file.seek(max(0, end - tail))
        lines = file.read(end - start).splitlines()
    for line in reversed(lines[1:] if start else lines):
        record = parse_record(line)
        if record is not None:
            yield record


def last_step(directory: Path) -> int:
    """Return the last step that a run's trainers logged metrics of, or -1."""
    for path in reversed(session_files(directory)):
        if session_kind(path) == SYSTEM:
            continue  # whose steps are seconds
        for record in iter_last_records(path):
            if record["type"] == METRICS and isinstance(record.get("step"), int):
                return int(record["step"])
    return -1


def end_status(path: Path) -> str | None:
    """Return how the session says that it ended, or None if it has not said."""
    last = next(iter_last_records(path, 4096), {})
    ended = last.get("type") == protocol.FINISH and last.get("status") in protocol.STATUSES
    return str(last["status"]) if ended else None


def gone_status(path: Path) -> str:
    """Return the status of a session whose writer is gone without having recorded its end.

    An import's first record says it in `ended`. A shipper that was killed is no fault of the run's.
    """
    begun = first_record(path) or {}
    if (ended := begun.get("ended")) in protocol.STATUSES:
        return str(ended)
    return "interrupted" if begun.get("kind") == SYSTEM else protocol.CRASHED


def gone_reason(path: Path) -> str:
    """Return why such a writer is gone: the stack that a signal left behind."""
    with contextlib.suppress(OSError):
        text = path.with_suffix(".fault").read_text(errors="replace")
        if stack := text[: protocol.MAX_REASON_CHARS].strip():
            said = "" if stack.startswith("Fatal") else "ended by a signal (SIGTERM or SIGHUP)\n"
            return said + stack
    return "killed (SIGKILL, or its machine stopped)"


def writer_is_alive(path: Path) -> bool:
    """Whether the process that writes this journal still runs on this machine."""
    with path.open("rb") as file:
        locked = try_lock(file, shared=True)
    if locked is None:  # no locks here: ask for the process instead
        return is_running((first_record(path) or {}).get("process"))
    return not locked


def session_status(path: Path) -> str:
    """Return a session's status: the recorded one, else running, or how it broke off."""
    return end_status(path) or ("running" if writer_is_alive(path) else gone_status(path))


def summarize(directory: Path) -> dict[str, Any]:
    """Read a run's journals and return what they say."""
    owner = require_run_file(directory)
    summary: dict[str, Any] = {
        **{key: owner[key] for key in ("run", "project", "name", "created")},
        "status": "empty",
        "updated": owner["created"],
        **{"tags": [], "group": None, "notes": None, "host": "", "config": {}},
        **{"texts": [], "tables": [], "checkpoints": []},
    }
    metrics = dict[str, dict[int, float]]()
    sessions = [_read_session(path, summary, metrics) for path in session_files(directory)]
    trainers = [session for session in sessions if session["kind"] != SYSTEM]
    # The newest trainer speaks for the run; of several ranks the first.
    for session in [s for s in trainers if s["rank"] == 0][-1:] or trainers[-1:]:
        summary["status"] = session["status"]
    if sessions and sessions[0]["started"]:
        summary["created"] = sessions[0]["started"]
    summary["sessions"] = sessions
    protocol.move_aliases(summary["checkpoints"])
    summary["metrics"] = [_describe(name, series) for name, series in sorted(metrics.items())]
    summary["summary"] = {m["name"]: m["last"] for m in summary["metrics"]}
    return summary


def _read_session(
    path: Path, summary: dict[str, Any], metrics: dict[str, dict[int, float]]
) -> dict[str, Any]:
    """Add a journal's records to the summary and the metrics, and return its session."""
    session: dict[str, Any] = {"session": path.stem, "kind": "", "rank": 0, "host": None}
    session |= {"started": None, "offset": 0, "damaged_lines": 0, "status": session_status(path)}
    for line, record in iter_lines(path):
        session["offset"] += len(line)
        if record is None:
            session["damaged_lines"] += 1
            continue
        if record["type"] == SESSION:
            kept = {key: record.get(key, session[key]) for key in ("kind", "rank", "host")}
            session |= {**kept, "started": record.get("time")}
        _add_record(summary, metrics, record, session["kind"])
    return session


def _add_record(
    summary: dict[str, Any], metrics: dict[str, dict[int, float]], record: dict[str, Any], kind: str
) -> None:
    summary["updated"] = max(summary["updated"], record.get("time", 0))
    if record["type"] == protocol.CONFIG or (record["type"] == SESSION and kind != SYSTEM):
        summary["config"] = summary["config"] | (record.get("config") or {})
        for key in ("tags", "group", "notes", "host"):
            summary[key] = summary[key] or record.get(key) or summary[key]
    elif record["type"] == METRICS:
        for name, value in values_of(record):
            metrics.setdefault(name, {})[record["step"]] = value
    elif record["type"] in (protocol.TEXT, protocol.TABLE):
        names = summary[f"{record['type']}s"]
        if record.get("name") not in names:
            names.append(record.get("name"))
    elif record["type"] == CHECKPOINT:
        size = sum(file.get("bytes", 0) for file in record.get("files", []))
        found = {key: record.get(key) for key in ("name", "step", "aliases", "metadata")}
        found |= {"created": record["time"], "bytes": size, "state": "local"}
        summary["checkpoints"].append(found)


def values_of(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield a metrics record's names and numbers; what is no number is passed over."""
    if not isinstance(record.get("step"), int):
        return
    for name, value in (record.get("values") or {}).items():
        try:
            yield name, float(protocol.decode_number(value))
        except (EndlexError, TypeError, ValueError, OverflowError):
            continue


def _describe(name: str, series: dict[int, float]) -> dict[str, Any]:
    finite, last = [value for value in series.values() if math.isfinite(value)], max(series)
    return {
        "name": name,
        "count": len(series),
        "last": protocol.encode_number(series[last]),
        "min": min(finite, default=None),
        "max": max(finite, default=None),
        "last_step": last,
    }


Points = dict[int, tuple[float, float]]  # time and value by step


def read_points(directory: Path) -> dict[str, Points]:
    """Return a run's points by metric and step; of two values at one step the later counts.

    The steps of the machine's own metrics are seconds since their session began; they continue from
    session to session, as the server exports them.
    """
    trainer = defaultdict[str, Points](dict)
    machine = defaultdict[str, list[tuple[float, int, float]]](list)
    for path in session_files(directory):
        is_machine = session_kind(path) == SYSTEM
        seen = defaultdict[str, Points](dict) if is_machine else trainer
        for record in iter_session(path):
            if record["type"] == METRICS:
                for name, value in values_of(record):
                    seen[name][record["step"]] = (record["time"], value)
        for name, points in seen.items() if is_machine else ():
            machine[name] += [(time, step, value) for step, (time, value) in sorted(points.items())]
    return {**trainer, **{name: _in_seconds(rows) for name, rows in machine.items()}}


def _in_seconds(rows: list[tuple[float, int, float]]) -> Points:
    start, last, points = min(time - step for time, step, _ in rows), -1, Points()
    for time, _, value in sorted(rows, key=lambda row: row[0]):
        last = max(last + 1, round(time - start))
        points[last] = (time, value)
    return points
