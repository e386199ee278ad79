"""Changes that people make to runs: their names, tags, notes, whether they are archived or gone."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

import orjson

from endlex.protocol import EndlexError, check_name
from endlex.server.errors import ApiError
from endlex.server.store.queries import find_run

MOST_TAGS = 50
MOST_NOTES_CHARS = 100_000


def check_changes(changes: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that a PATCH sets, with their new values.

    Raises:
        ApiError: 422, a key is not one of a run's, or a value is not of its kind.
    """
    if not changes:
        raise ApiError(422, "nothing to change: give name, tags, group, notes, archived or deleted")
    return dict(_column(key, value) for key, value in changes.items())


def _column(key: str, value: Any) -> tuple[str, Any]:
    try:
        if key == "name":
            return "name", check_name(value, "run name")
        if key == "group":
            return "group_name", check_name(value, "group") if value else None
    except EndlexError as error:
        raise ApiError(422, str(error)) from error
    if key == "notes" and (value is None or isinstance(value, str)):
        if len(value or "") > MOST_NOTES_CHARS:
            raise ApiError(422, f"notes have at most {MOST_NOTES_CHARS:,} characters")
        return "notes", value
    if key == "tags" and isinstance(value, list) and len(value) <= MOST_TAGS:
        tags = dict.fromkeys(check_name(tag, "tag") for tag in value)
        return "tags", orjson.dumps(list(tags)).decode()
    if key == "archived" and isinstance(value, bool):
        return "archived", int(value)
    if key == "deleted" and isinstance(value, bool):
        return "deleted", time.time() if value else None
    raise ApiError(
        422,
        f"{key[:40]}={str(value)[:40]!r} is no change to a run: name and notes are text, group is "
        f"text or null, tags a list of up to {MOST_TAGS} texts, archived and deleted true or false",
    )


def change_run(connection: sqlite3.Connection, run: str, columns: dict[str, Any]) -> str:
    """Set columns of a run and return its status.

    Raises:
        ApiError: 404.
    """
    pk = find_run(connection, run)
    assignments = ", ".join(f"{column}=?" for column in columns)
    connection.execute(f"UPDATE run SET {assignments} WHERE pk=?", [*columns.values(), pk])
    row = connection.execute("SELECT status FROM run WHERE pk=?", (pk,)).fetchone()
    status: str = row[0]
    return status


def dismiss_alert(connection: sqlite3.Connection, alert: int) -> str | None:
    """Mark an alert as seen and return its run's id; None for the server's own.

    Raises:
        ApiError: 404.
    """
    changed = connection.execute(
        "UPDATE alert SET dismissed=coalesce(dismissed, ?) WHERE pk=?", (time.time(), alert)
    ).rowcount
    if not changed:
        raise ApiError(404, f"there is no alert {alert}: GET /api/v1/alerts lists them")
    row = connection.execute(
        "SELECT run.id FROM alert LEFT JOIN run ON run.pk = alert.run WHERE alert.pk=?", (alert,)
    ).fetchone()
    found: str | None = row[0]
    return found
