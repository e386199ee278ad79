"""Configurations stored key by key, so that runs can be searched and sorted by them."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any

import orjson

from endlex.protocol import SYSTEM
from endlex.search import flatten

MAX_KEYS = 2000
"""Keys kept per record of a session."""
MAX_TEXT_CHARS = 1000


def store_config(connection: sqlite3.Connection, run: int, config: Mapping[str, Any]) -> None:
    """Keep the leaves of a configuration for `endlex.search`, in place of earlier values."""
    rows = [(run, key, *_columns(value)) for key, value in flatten(config).items()]
    connection.executemany("INSERT OR REPLACE INTO run_config VALUES (?, ?, ?, ?)", rows[:MAX_KEYS])


def _columns(value: Any) -> tuple[float | None, str]:
    """Return a value as a number, if it is one, and as the text that a search compares."""
    if isinstance(value, list | dict):
        return None, orjson.dumps(value).decode()[:MAX_TEXT_CHARS]
    text = str(value)[:MAX_TEXT_CHARS]
    if isinstance(value, bool) or value is None:
        return None, text
    try:
        return float(value), text
    except (ValueError, OverflowError):
        return None, text


def fill_config(connection: sqlite3.Connection) -> None:
    """Fill the table in a database that was made before it existed."""
    rows = connection.execute(
        "SELECT run, config FROM session WHERE kind != ? ORDER BY pk", (SYSTEM,)
    )
    for run, config in rows.fetchall():
        store_config(connection, run, orjson.loads(config))
