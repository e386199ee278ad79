"""What people change: runs' names, tags, notes and colours, alerts they saw, and saved settings.

A setting is a JSON object under a project, a kind and a name: a view of the run table, the panels
of a board. An empty project stands for the list of all runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from sqlite3 import Connection
from typing import Annotated, Any

import orjson
from pydantic import AfterValidator, BaseModel, Field

from endlex.protocol import check_name
from endlex.server.errors import ApiError
from endlex.server.store.queries import find_run

MOST_TAGS = 50
MOST_NOTES_CHARS = 100_000
SETTING_KINDS = ("view", "panels", "rules")
MAX_SETTING_BYTES = 256 * 1024
MOST_SETTINGS = 200
"""Settings of one kind per project."""

RunName = Annotated[str, AfterValidator(partial(check_name, what="run name"))]
Tags = list[Annotated[str, AfterValidator(partial(check_name, what="tag"))]]


class Changes(BaseModel, extra="forbid", strict=True):
    """What a PATCH sets of a run; what it does not give stays as it is."""

    name: RunName = ""
    group: str | None = None
    notes: Annotated[str, Field(max_length=MOST_NOTES_CHARS)] | None = None
    color: Annotated[str, Field(pattern="^#[0-9a-f]{6}$")] | None = None
    archived: bool = False
    deleted: bool = False
    tags: Tags = []
    add_tags: Tags = []
    remove_tags: Tags = []

    def columns(self, tags: list[str]) -> dict[str, Any]:
        """Return the columns to set in a run with some tags; too many are an `ApiError` 422."""
        given = self.model_dump(exclude_unset=True)
        tags = [*given.pop("tags", tags), *given.pop("add_tags", ())]
        gone = given.pop("remove_tags", ())
        kept = [tag for tag in dict.fromkeys(tags) if tag not in gone]
        if len(kept) > MOST_TAGS:
            raise ApiError(422, f"a run has at most {MOST_TAGS} tags, and these are {len(kept)}")
        if "group" in given:
            group = given.pop("group")
            given["group_name"] = check_name(group, "group") if group else None
        if "deleted" in given:
            given["deleted"] = time.time() if self.deleted else None
        return {**given, "tags": orjson.dumps(kept).decode()}


def change_runs(db: Connection, runs: Sequence[str], changes: Changes) -> dict[str, str]:
    """Change runs, all or none of them, and return the status of each.

    It is an `ApiError` 422 that nothing is to change, or that a run gets too many tags.
    """
    if not changes.model_fields_set:
        raise ApiError(422, "nothing to change: give name, tags, group, notes, archived or deleted")
    statuses: dict[str, str] = {}
    for run in runs:
        pk = find_run(db, run)
        query = "SELECT status, tags FROM run WHERE pk=?"
        statuses[run], tags = db.execute(query, (pk,)).fetchone()
        values = changes.columns(orjson.loads(tags))
        assignments = ", ".join(f"{column}=?" for column in values)
        db.execute(f"UPDATE run SET {assignments} WHERE pk=?", [*values.values(), pk])
    return statuses


def list_settings(db: Connection, project: str) -> dict[str, dict[str, Any]]:
    """Return what is saved for a project, by kind and name."""
    found: dict[str, dict[str, Any]] = {kind: {} for kind in SETTING_KINDS}
    rows = db.execute(
        "SELECT kind, name, content FROM setting WHERE project=? ORDER BY kind, name", (project,)
    )
    for kind, name, content in rows:
        found.setdefault(kind, {})[name] = orjson.loads(content)
    return found


def save_setting(db: Connection, project: str, kind: str, name: str, content: Any) -> None:
    """Save a setting in place of an earlier one; None deletes it. `ApiError` 422 if it is wrong."""
    if project:
        check_name(project, "project")
    check_name(name, "name")
    if kind not in SETTING_KINDS:
        raise ApiError(422, f"kind is {kind[:40]!r}; it is one of {', '.join(SETTING_KINDS)}")
    if content is None:
        query = "DELETE FROM setting WHERE project=? AND kind=? AND name=?"
        db.execute(query, (project, kind, name))
        return
    text = orjson.dumps(content).decode()
    if len(text) > MAX_SETTING_BYTES:
        raise ApiError(422, f"{name!r} has {len(text):,} characters; at most {MAX_SETTING_BYTES:,}")
    query = "SELECT count(*) FROM setting WHERE project=? AND kind=?"
    if db.execute(query, (project, kind)).fetchone()[0] >= MOST_SETTINGS:
        raise ApiError(422, f"there are {MOST_SETTINGS} of kind {kind} already: delete some")
    values = (project, kind, name, text, time.time())
    db.execute("INSERT OR REPLACE INTO setting VALUES (?, ?, ?, ?, ?)", values)


def dismiss_alert(db: Connection, alert: int) -> str | None:
    """Mark an alert as seen, or raise 404, and return its run's id; None for the server's own."""
    row = db.execute(
        "UPDATE alert SET dismissed=coalesce(dismissed, ?) WHERE pk=? "
        "RETURNING (SELECT id FROM run WHERE run.pk = alert.run)",
        (time.time(), alert),
    ).fetchone()
    if row is None:
        raise ApiError(404, f"there is no alert {alert}: GET /api/v1/alerts lists them")
    return None if row[0] is None else str(row[0])
