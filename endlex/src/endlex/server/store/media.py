"""A run's pictures, sound, video and other files: what their records say, and their parts.

Their content is parts like those of checkpoints' files (`blobs`), and as safe from removal.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

import orjson

from endlex.protocol import EndlexError, check_sha256
from endlex.server.errors import ApiError
from endlex.server.store.texts import Page, latest

SCHEMA = """
CREATE TABLE media (
    pk INTEGER PRIMARY KEY, run INTEGER NOT NULL, name TEXT NOT NULL, step INTEGER NOT NULL,
    time REAL NOT NULL, content TEXT NOT NULL
);
CREATE INDEX media_by_name ON media (run, name, step);
CREATE TABLE media_part (
    sha256 TEXT NOT NULL, run INTEGER NOT NULL, bytes INTEGER NOT NULL, PRIMARY KEY (sha256, run)
) WITHOUT ROWID;
"""
MOST_PARTS = 10_000
KEYS = ("kind", "mime", "bytes", "caption", "parts")


def check_media(record: dict[str, Any]) -> None:
    """Raise an `EndlexError` at a record of media that is none."""
    parts = record["parts"]
    if not isinstance(parts, list) or len(parts) > MOST_PARTS:
        raise EndlexError("not a list of parts")
    for part in parts:
        check_sha256(part["sha256"])
        if type(part["bytes"]) is not int or part["bytes"] < 1:
            raise EndlexError("not a part")
    if record["bytes"] != sum(part["bytes"] for part in parts):
        raise EndlexError("the parts do not add up")
    if not isinstance(record["kind"], str) or not isinstance(record["mime"], str):
        raise EndlexError("not media")


def store_media(
    connection: sqlite3.Connection, run: int, records: Sequence[dict[str, Any]]
) -> None:
    """Keep what records say, and that their parts are used."""
    for record in records:
        content = orjson.dumps({key: record.get(key) for key in KEYS}).decode()
        values = (run, record["name"], record["step"], record["time"], content)
        connection.execute(
            "INSERT INTO media (run, name, step, time, content) VALUES (?, ?, ?, ?, ?)", values
        )
        connection.executemany(
            "INSERT OR IGNORE INTO media_part VALUES (?, ?, ?)",
            [(part["sha256"], run, part["bytes"]) for part in record["parts"]],
        )


def list_media(connection: sqlite3.Connection, run: int, page: Page) -> list[dict[str, Any]]:
    """Return a page of media as `list_texts` does of texts, with the ids of their files."""
    rows = latest(connection, "media", "json_set(content, '$.id', pk)", run, page)
    return [{"name": n, "step": s, "time": t, **orjson.loads(content)} for n, s, t, content in rows]


def find_media(connection: sqlite3.Connection, run: int, pk: int) -> dict[str, Any]:
    """Return one record.

    Raises:
        ApiError: 404.
    """
    row = connection.execute("SELECT content FROM media WHERE pk=? AND run=?", (pk, run)).fetchone()
    if row is None:
        raise ApiError(404, f"the run has no file {pk}: GET .../media lists them")
    found: dict[str, Any] = orjson.loads(row[0])
    return found
