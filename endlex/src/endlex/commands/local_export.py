"""A run's directory as CSV or JSON, equal to what the server makes of the same journals.

Of two values of a metric at one step the later one counts. The steps of a session that measures
the machine are seconds since it began; here they are counted from the first of those sessions.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from endlex.protocol import METRICS, SESSION, SYSTEM, TABLE, TEXT, encode_number
from endlex.reading import iter_session, session_files, summarize, values_of

Points = dict[int, tuple[float, float]]
"""By step: time and value."""
RUN_KEYS = ("run", "project", "name", "status", "created", "tags", "group", "notes", "host")
SESSION_KEYS = ("session", "kind", "rank", "host", "started", "offset", "damaged_lines", "status")
CHECKPOINT_KEYS = ("name", "step", "bytes", "aliases", "metadata")


def read_points(directory: Path) -> dict[str, Points]:
    """Return the points of each metric by step, metrics by name."""
    found: dict[str, Points] = {}
    began: float | None = None
    for path in session_files(directory):
        shift = 0
        for record in iter_session(path):
            if record["type"] == SESSION and record.get("kind") == SYSTEM:
                began = record["time"] if began is None else began
                shift = int(record["time"] - began)
            elif record["type"] == METRICS:
                for name, value in values_of(record):
                    points = found.setdefault(name, {})
                    points[record["step"] + shift] = (record["time"], value)
    return {name: dict(sorted(found[name].items())) for name in sorted(found)}


def write_local_csv(directory: Path, file: IO[bytes]) -> None:
    """Write a run's metrics, a row per point."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        writer = csv.writer(text)
        writer.writerow(["metric", "step", "time", "value"])
        for name, points in read_points(directory).items():
            for step, (time, value) in points.items():
                writer.writerow([name, step, float(time), encode_number(value)])
        text.flush()
    finally:
        text.detach()  # the file is the caller's to close


def write_local_json(directory: Path, file: IO[bytes]) -> None:
    """Write all that a run's journals hold as one JSON object."""
    whole = summarize(directory)
    content: dict[str, Any] = {key: whole[key] for key in (*RUN_KEYS, "config")}
    content["sessions"] = [{key: s[key] for key in SESSION_KEYS} for s in whole["sessions"]]
    checkpoints = sorted(whole["checkpoints"], key=lambda checkpoint: int(checkpoint["step"]))
    content["checkpoints"] = [{key: c[key] for key in CHECKPOINT_KEYS} for c in checkpoints]
    content["series"] = {n: _series(points) for n, points in read_points(directory).items()}
    content["texts"] = _records(directory, TEXT, ("text",))
    content["tables"] = _records(directory, TABLE, ("columns", "rows"))
    file.write(json.dumps(content, ensure_ascii=False).encode() + b"\n")


def _series(points: Points) -> dict[str, list[Any]]:
    values = [encode_number(value) for _, value in points.values()]
    return {"step": list(points), "time": [time for time, _ in points.values()], "value": values}


def _records(directory: Path, kind: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return texts or tables, latest steps first; of two of a name and step the later one."""
    latest: dict[tuple[int, str], dict[str, Any]] = {}
    for record in _iter_type(directory, kind):
        kept = {key: record.get(key) for key in ("name", "step", "time", *keys)}
        latest[(-record["step"], record["name"])] = kept
    return [latest[place] for place in sorted(latest)]


def _iter_type(directory: Path, kind: str) -> Iterator[dict[str, Any]]:
    for path in session_files(directory):
        for record in iter_session(path):
            whole = isinstance(record.get("step"), int) and isinstance(record.get("name"), str)
            if record["type"] == kind and whole:
                yield record
