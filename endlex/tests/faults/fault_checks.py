"""Is what the server holds what the journal says, byte for byte and point for point?"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from endlex.client.directories import read_run_file
from endlex.protocol import METRICS, SESSION, SYSTEM, decode_number
from endlex.reading import content_length, read_journal, session_files

RANGE = 25_000
"""Steps asked for at once: few enough to come without downsampling."""


@dataclass(frozen=True)
class Difference:
    """What the server lacks, and what it has too often; both zero when all is well."""

    missing: int
    duplicated: int
    hashes_equal: bool
    points: int
    """In the journals, each metric and step once."""


def ask(url: str, path: str, **query: Any) -> Any:
    """GET JSON of the API; None for a 404."""
    address = f"{url}/api/v1{path}?{urlencode(query, doseq=True)}"
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def journal_points(directory: Path) -> dict[str, dict[int, float]]:
    """The value of each metric and step, the later session's where two have it."""
    points: dict[str, dict[int, float]] = {}
    for path in session_files(directory):
        for record in read_journal(path):
            if record["type"] == METRICS:
                for name, value in record["values"].items():
                    points.setdefault(name, {})[record["step"]] = decode_number(value)
    return points


def compare(directory: Path, url: str) -> Difference:
    """Compare a run's directory with the server: journals by hash, the trainer's metrics by point.

    Points are counted as the server stores them, so that one stored twice is seen although a
    chart would show it once; for that no step may be logged twice on purpose.
    """
    owner = read_run_file(directory)
    assert owner is not None
    run = owner["run"]
    equal = all(_same_hash(path, url, run) for path in session_files(directory))
    stored = {
        m["name"]: m["count"] for m in (ask(url, f"/runs/{run}") or {"metrics": []})["metrics"]
    }
    missing = duplicated = total = 0
    for name, points in journal_points(directory).items():
        if name.startswith("system/"):  # their steps are seconds, and may repeat
            continue
        held = _server_points(url, run, name, max(points))
        total += len(points)
        missing += sum(held.get(step) != value for step, value in points.items())
        duplicated += max(len(held.keys() - points.keys()), stored.get(name, 0) - len(points), 0)
    return Difference(missing, duplicated, equal, total)


def _same_hash(path: Path, url: str, run: str) -> bool:
    """Whether the server has all of a session, and exactly it."""
    length = content_length(path)
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(length)).hexdigest()
    answer = ask(url, f"/runs/{run}/sessions/{path.stem}/journal", upto=length)
    if answer is None:
        return length == 0
    return bool(answer["offset"] == length and answer["sha256"] == digest)


def _server_points(url: str, run: str, name: str, last: int) -> dict[int, float]:
    """The value that the server has at each step of a metric."""
    points: dict[int, float] = {}
    for start in range(0, last + RANGE + 1, RANGE):
        query = {"metric": name, "x": "step", "from": start, "to": start + RANGE - 1}
        answer = ask(url, f"/runs/{run}/series", points=100_000, **query)
        series = (answer or {"series": {}})["series"].get(name)
        if series:
            points |= {int(x): y for x, y in zip(series["x"], series["y"], strict=True)}
    return points


def logged_steps_in_journal(directory: Path, last_logged: int) -> int:
    """How many of the steps 0 to `last_logged`, which `log` returned from, no journal has."""
    steps = set()
    for path in session_files(directory):
        for record in read_journal(path):
            if record["type"] == SESSION and record["kind"] == SYSTEM:
                break
            if record["type"] == METRICS:
                steps.add(record["step"])
    return sum(step not in steps for step in range(last_logged + 1))


def download_digest(url: str, run: str, name: str) -> str:
    """The SHA-256 of a checkpoint's `model.bin` as the server hands it out, or its refusal."""
    digest = hashlib.sha256()
    address = f"{url}/api/v1/runs/{run}/checkpoints/{name}/files/model.bin"
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            while block := answer.read(2**20):
                digest.update(block)
    except urllib.error.HTTPError as error:
        return f"status {error.code}"
    return digest.hexdigest()


def write_random_file(path: Path, size: int) -> str:
    """Write `size` random bytes; return their SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        while size:
            block = os.urandom(min(size, 2**22))
            digest.update(block)
            file.write(block)
            size -= len(block)
    return digest.hexdigest()
