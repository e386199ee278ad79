"""A run's directory as CSV or JSON, equal to what the server makes of the same journals.

Of two values of a metric at one step the later one counts. The steps of a session that measures
the machine are seconds since it began, so those sessions stay apart: in CSV they have rows of their
own behind the trainer's, in JSON their points follow one another.
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
TRAINER_GROUP = ""
RUN_KEYS = ("run", "project", "name", "status", "created", "tags", "group", "notes", "host")
SESSION_KEYS = ("session", "kind", "rank", "host", "started", "offset", "damaged_lines", "status")
CHECKPOINT_KEYS = ("name", "step", "bytes", "aliases", "metadata")


def read_groups(directory: Path) -> dict[str, dict[str, Points]]:
    """Return the points by group and metric: the trainer's, then each session's of the machine."""
    groups: dict[str, dict[str, Points]] = {TRAINER_GROUP: {}}
    for path in session_files(directory):
        group = groups[TRAINER_GROUP]
        for record in iter_session(path):
            if record["type"] == SESSION and record.get("kind") == SYSTEM:
                group = groups.setdefault(path.stem, {})
            elif record["type"] == METRICS:
                for name, value in values_of(record):
                    group.setdefault(name, {})[record["step"]] = (record["time"], value)
    of_machine = {name for key, group in groups.items() if key for name in group}
    trainer = groups[TRAINER_GROUP]
    groups[TRAINER_GROUP] = {n: points for n, points in trainer.items() if n not in of_machine}
    return groups


def write_local_csv(directory: Path, file: IO[bytes]) -> None:
    """Write a run's metrics: a row a step, a column a metric."""
    groups = read_groups(directory)
    names = list(dict.fromkeys(name for group in groups.values() for name in sorted(group)))
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        writer = csv.writer(text)
        writer.writerow(["step", "time", *names])
        for group in groups.values():
            for step in sorted({step for points in group.values() for step in points}):
                there = {name: points[step] for name, points in group.items() if step in points}
                values = {name: encode_number(value) for name, (_, value) in there.items()}
                moment = float(max(time for time, _ in there.values()))
                writer.writerow([step, moment, *(values.get(name, "") for name in names)])
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
    content["series"] = _series(read_groups(directory))
    content["texts"] = _records(directory, TEXT, ("text",))
    content["tables"] = _records(directory, TABLE, ("columns", "rows"))
    file.write(json.dumps(content, ensure_ascii=False).encode() + b"\n")


def _series(groups: dict[str, dict[str, Points]]) -> dict[str, dict[str, list[Any]]]:
    found: dict[str, dict[str, list[Any]]] = {}
    for name in sorted({name for group in groups.values() for name in group}):
        one: dict[str, list[Any]] = {"step": [], "time": [], "value": []}
        for group in groups.values():
            for step, (time, value) in sorted(group.get(name, {}).items()):
                one["step"].append(step)
                one["time"].append(time)
                one["value"].append(encode_number(value))
        found[name] = one
    return found


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
