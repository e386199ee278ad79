"""Texts and tables of a run, such as samples and scores by task: latest steps first, in pages."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

import orjson

OWN_PREFIX = "run/"


@dataclass(frozen=True)
class Page:
    """Which of them: `limit` of the latest steps, of one name, below a step, if these are given.

    A step comes whole, though that be more than `limit`: the next page goes on below it.
    """

    name: str | None = None
    before_step: int | None = None
    limit: int = 100
    own: bool = True
    """Whether those are among them that Endlex records itself, such as what a run printed."""


def list_texts(connection: sqlite3.Connection, run: int, page: Page) -> list[dict[str, Any]]:
    """Return a page of texts; of two under one name and step the later one."""
    rows = latest(connection, "text", "text", run, page)
    return [{"name": n, "step": s, "time": t, "text": content} for n, s, t, content in rows]


def list_tables(connection: sqlite3.Connection, run: int, page: Page) -> list[dict[str, Any]]:
    """Return a page of tables as `list_texts` does of texts."""
    rows = latest(connection, "data_table", "content", run, page)
    return [{"name": n, "step": s, "time": t, **orjson.loads(content)} for n, s, t, content in rows]


def latest(
    connection: sqlite3.Connection, table: str, column: str, run: int, page: Page
) -> list[tuple[Any, ...]]:
    """Return name, step, time and a column of a page of records, the later of two of a step."""
    where = "run = ?"
    values: list[Any] = [run]
    if page.name is not None:
        where += " AND name = ?"
        values.append(page.name)
    elif not page.own:
        where += f" AND name NOT LIKE '{OWN_PREFIX}%'"
    if page.before_step is not None:
        where += " AND step < ?"
        values.append(page.before_step)
    chosen = f"SELECT max(pk) FROM {table} WHERE {where} GROUP BY name, step"
    lowest = connection.execute(
        f"SELECT min(step) FROM (SELECT step FROM {table} WHERE pk IN ({chosen}) "
        "ORDER BY step DESC LIMIT ?)",
        [*values, page.limit],
    ).fetchone()[0]
    if lowest is None:
        return []
    return connection.execute(
        f"SELECT name, step, time, {column} FROM {table} WHERE pk IN ({chosen}) AND step >= ? "
        "ORDER BY step DESC, name",
        [*values, lowest],
    ).fetchall()
