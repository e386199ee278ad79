"""What a run's directory says about the run, in the shape of the server's `GET /runs/{run}`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from endlex.client.journal import (
    content_length,
    end_status,
    gone_status,
    parse_record,
    session_files,
    writer_is_alive,
)
from endlex.commands.targets import open_run_directory
from endlex.protocol import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    SESSION,
    SYSTEM,
    TABLE,
    TEXT,
    EndlexError,
    decode_number,
    encode_number,
)


def iter_session(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a session's records; damaged lines are passed over, as the server does."""
    with path.open("rb") as file:
        for line in file:
            record = parse_record(line) if line.endswith(b"\n") else None
            if record is not None:
                yield record


def session_status(path: Path) -> str:
    """Return how a session stands: its own word, else running, or how it broke off."""
    return end_status(path) or ("running" if writer_is_alive(path) else gone_status(path))


def summarize(directory: Path) -> dict[str, Any]:
    """Read a run's journals and return what they say.

    Raises:
        EndlexError: it is not a run's directory.
    """
    owner = open_run_directory(directory)
    summary: dict[str, Any] = {
        **{key: owner[key] for key in ("run", "project", "name", "created")},
        "status": "empty",
        "updated": owner["created"],
        **{"tags": [], "group": None, "notes": None, "host": "", "config": {}, "sessions": []},
        **{"texts": [], "tables": [], "checkpoints": []},
    }
    metrics: dict[str, dict[int, float]] = {}
    for path in session_files(directory):
        begun: dict[str, Any] = {}
        for record in iter_session(path):
            begun = record if record["type"] == SESSION else begun
            _add_record(summary, metrics, record, begun.get("kind", ""))
        summary["sessions"].append(_describe_session(path, begun))
    trainers = [session for session in summary["sessions"] if session["kind"] != SYSTEM]
    # The newest trainer speaks for the run; of several ranks the first.
    for session in [s for s in trainers if s["rank"] == 0][-1:] or trainers[-1:]:
        summary["status"] = session["status"]
    for session in summary["sessions"][:1]:
        summary["created"] = session["started"] or summary["created"]
    summary["metrics"] = [_describe(name, series) for name, series in sorted(metrics.items())]
    summary["summary"] = {m["name"]: m["last"] for m in summary["metrics"]}
    return summary


def _describe_session(path: Path, begun: dict[str, Any]) -> dict[str, Any]:
    end = content_length(path)
    with path.open("rb") as file:
        whole = (line for line in file if line.endswith(b"\n"))
        damaged = sum(parse_record(line) is None for line in whole)
    return {
        "session": path.stem,
        "kind": begun.get("kind", ""),
        "rank": begun.get("rank", 0),
        "host": begun.get("host"),
        "started": begun.get("time"),
        "offset": end,
        "damaged_lines": damaged,
        "status": session_status(path),
    }


def _add_record(
    summary: dict[str, Any], metrics: dict[str, dict[int, float]], record: dict[str, Any], kind: str
) -> None:
    summary["updated"] = max(summary["updated"], record.get("time", 0))
    if record["type"] == SESSION and kind != SYSTEM:
        summary["config"] = summary["config"] | (record.get("config") or {})
        for key in ("tags", "group", "notes", "host"):
            summary[key] = summary[key] or record.get(key) or summary[key]
    elif record["type"] == CONFIG:
        summary["config"] = summary["config"] | (record.get("config") or {})
    elif record["type"] == METRICS:
        for name, value in values_of(record):
            metrics.setdefault(name, {})[record["step"]] = value
    elif record["type"] in (TEXT, TABLE):
        names = summary[f"{record['type']}s"]
        if record.get("name") not in names:
            names.append(record.get("name"))
    elif record["type"] == CHECKPOINT:
        size = sum(file.get("bytes", 0) for file in record.get("files", []))
        kept = {key: record.get(key) for key in ("name", "step", "aliases", "metadata")}
        summary["checkpoints"].append(
            {**kept, "created": record["time"], "bytes": size, "state": "local"}
        )


def values_of(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield a metrics record's names and numbers; what is no number is passed over."""
    if not isinstance(record.get("step"), int):
        return
    for name, value in (record.get("values") or {}).items():
        try:
            yield name, float(decode_number(value))
        except (EndlexError, TypeError, ValueError, OverflowError):
            continue


def _describe(name: str, series: dict[int, float]) -> dict[str, Any]:
    finite = [value for value in series.values() if math.isfinite(value)]
    last_step = max(series)
    return {
        "name": name,
        "count": len(series),
        "last": encode_number(series[last_step]),
        "min": min(finite, default=None),
        "max": max(finite, default=None),
        "last_step": last_step,
    }
