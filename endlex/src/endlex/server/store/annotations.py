"""What people change: runs' names, tags, notes and colours, alerts they saw, and saved settings.

A setting is a JSON object under a project, a kind and a name: a view of the run table, the panels
of a board. An empty project stands for the list of all runs.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Sequence
from typing import Any

import orjson

from endlex.protocol import check_name
from endlex.server.errors import ApiError
from endlex.server.store.queries import find_run

MOST_TAGS = 50
MOST_NOTES_CHARS = 100_000
COLOR = re.compile(r"#[0-9a-f]{6}")
SETTING_KINDS = ("view", "panels", "rules")
MAX_SETTING_BYTES = 256 * 1024
MOST_SETTINGS = 200
"""Of one project and kind."""


def check_changes(changes: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that a PATCH sets, with their new values.

    Raises:
        ApiError: 422, a key is not one of a run's, or a value is not of its kind.
    """
    if not changes:
        raise ApiError(422, "nothing to change: give name, tags, group, notes, archived or deleted")
    return dict(_column(key, value) for key, value in changes.items())


def _column(key: str, value: Any) -> tuple[str, Any]:
    if key == "name":
        return "name", check_name(value, "run name")
    if key == "group":
        return "group_name", check_name(value, "group") if value else None
    if key == "notes" and (value is None or isinstance(value, str)):
        if len(value or "") > MOST_NOTES_CHARS:
            raise ApiError(422, f"notes have at most {MOST_NOTES_CHARS:,} characters")
        return "notes", value
    if key in ("tags", "add_tags", "remove_tags") and isinstance(value, list):
        return key, list(dict.fromkeys(check_name(tag, "tag") for tag in value))
    if key == "color" and (value is None or (isinstance(value, str) and COLOR.fullmatch(value))):
        return "color", value
    if key == "archived" and isinstance(value, bool):
        return "archived", int(value)
    if key == "deleted" and isinstance(value, bool):
        return "deleted", time.time() if value else None
    raise ApiError(
        422,
        f"{key[:40]}={str(value)[:40]!r} is no change to a run: name and notes are text, group is "
        "text or null, tags, add_tags and remove_tags are lists of texts, color is like #2f6feb or "
        "null, archived and deleted are true or false",
    )


def change_runs(
    connection: sqlite3.Connection, runs: Sequence[str], columns: dict[str, Any]
) -> dict[str, str]:
    """Set columns of runs, of all or none, and return the status of each.

    Raises:
        ApiError: 404, or 422 for too many tags.
    """
    statuses: dict[str, str] = {}
    for run in runs:
        pk = find_run(connection, run)
        query = "SELECT status, tags FROM run WHERE pk=?"
        statuses[run], tags = connection.execute(query, (pk,)).fetchone()
        values = {k: v for k, v in columns.items() if k not in ("add_tags", "remove_tags")}
        values["tags"] = _new_tags(orjson.loads(tags), columns)
        assignments = ", ".join(f"{column}=?" for column in values)
        connection.execute(f"UPDATE run SET {assignments} WHERE pk=?", [*values.values(), pk])
    return statuses


def _new_tags(tags: list[str], columns: dict[str, Any]) -> str:
    tags = [*columns.get("tags", tags), *columns.get("add_tags", ())]
    gone = columns.get("remove_tags", ())
    kept = [tag for tag in dict.fromkeys(tags) if tag not in gone]
    if len(kept) > MOST_TAGS:
        raise ApiError(422, f"a run has at most {MOST_TAGS} tags, and these are {len(kept)}")
    return orjson.dumps(kept).decode()


def list_settings(connection: sqlite3.Connection, project: str) -> dict[str, dict[str, Any]]:
    """Return what is saved for a project, by kind and name."""
    found: dict[str, dict[str, Any]] = {kind: {} for kind in SETTING_KINDS}
    rows = connection.execute(
        "SELECT kind, name, content FROM setting WHERE project=? ORDER BY kind, name", (project,)
    )
    for kind, name, content in rows:
        found.setdefault(kind, {})[name] = orjson.loads(content)
    return found


def save_setting(
    connection: sqlite3.Connection, project: str, kind: str, name: str, content: Any
) -> None:
    """Save a setting in place of an earlier one of its name; None deletes it.

    Raises:
        ApiError: 422, it is not one.
    """
    if project:
        check_name(project, "project")
    check_name(name, "name")
    if kind not in SETTING_KINDS:
        raise ApiError(422, f"kind is {kind[:40]!r}; it is one of {', '.join(SETTING_KINDS)}")
    if content is None:
        query = "DELETE FROM setting WHERE project=? AND kind=? AND name=?"
        connection.execute(query, (project, kind, name))
        return
    text = orjson.dumps(content).decode()
    if len(text) > MAX_SETTING_BYTES:
        raise ApiError(422, f"{name!r} has {len(text):,} characters; at most {MAX_SETTING_BYTES:,}")
    query = "SELECT count(*) FROM setting WHERE project=? AND kind=?"
    if connection.execute(query, (project, kind)).fetchone()[0] >= MOST_SETTINGS:
        raise ApiError(422, f"there are {MOST_SETTINGS} of kind {kind} already: delete some")
    values = (project, kind, name, text, time.time())
    connection.execute("INSERT OR REPLACE INTO setting VALUES (?, ?, ?, ?, ?)", values)


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
