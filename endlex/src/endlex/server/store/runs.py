"""What pages and commands ask and change: runs, their alerts, and saved settings.

A setting is a JSON object under a project, a kind and a name: a view of the run table, the panels
of a board. An empty project stands for the list of all runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from sqlite3 import Connection
from typing import Annotated, Any

import orjson
from pydantic import AfterValidator, BaseModel, Field

from endlex.protocol import REMOVED, SYSTEM, check_name, move_aliases
from endlex.search import flatten, parse_key, parse_search
from endlex.server.errors import ApiError
from endlex.server.store import search
from endlex.server.store.database import dicts, insert, update
from endlex.server.store.search import Condition, marks, read_values

SHORT_CONFIG_KEYS = 200
SHORT_CONFIG_CHARS = 100
MOST_ALERTS = 500
MOST_TAGS = 50
MOST_NOTES_CHARS = 100_000
SETTING_KINDS = ("view", "panels", "rules")
MAX_SETTING_BYTES = 256 * 1024
MOST_SETTINGS = 200
"""Settings of one kind per project."""

RunName = Annotated[str, AfterValidator(partial(check_name, what="run name"))]
Tags = list[Annotated[str, AfterValidator(partial(check_name, what="tag"))]]
OPEN = "resolved IS NULL AND dismissed IS NULL"
"""The condition for an alert that is open."""
RUN_COLUMNS = f"""
    run.pk AS number, run.id AS run, project, name, status, created, updated, tags,
    group_name AS "group", notes, archived, deleted, host, color,
    (SELECT count(*) FROM alert WHERE alert.run = run.pk AND {OPEN}) AS alerts
"""


class RunQuery(BaseModel, frozen=True):
    """Selects and orders runs; `sort` is a key (`endlex.search`), with "-" in front descending.

    `archived` and `deleted`: "true" lists only those, "any" includes them, None leaves them out.
    With `column`, a run has the values of these keys in place of its summary and configuration.
    """

    q: Annotated[str, Field(max_length=1000)] = ""
    project: str | None = None
    group: str | None = None
    sort: Annotated[str, Field(max_length=300)] = "-created"
    archived: str | None = None
    deleted: str | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    offset: Annotated[int, Field(ge=0, lt=2**62)] = 0
    column: list[Annotated[str, Field(max_length=200)]] = []
    names: bool = False
    """Whether to list the metrics and configuration keys of all the runs found."""
    ids: Annotated[str, Field(max_length=40_000)] = ""
    """Ids, joined with commas: only these runs, archived or not."""


def find_run(db: Connection, run: str) -> int:
    """Return a run's key; an unknown id is an `ApiError` 404."""
    row = db.execute("SELECT pk FROM run WHERE id=?", (run,)).fetchone()
    if row is None:
        raise ApiError(404, f"there is no run {run[:40]!r} here: `endlex ls` lists them")
    return int(row[0])


def list_runs(db: Connection, query: RunQuery) -> dict[str, Any]:
    """Return the runs that match and how many they are; a wrong search is an `EndlexError`."""
    where, values = _where(db, query)
    total = db.execute(f"SELECT count(*) FROM run WHERE {where}", values).fetchone()[0]
    order, order_values = search.sort_order(db, query.sort)
    listed = f"SELECT {RUN_COLUMNS} FROM run WHERE {where} ORDER BY {order} LIMIT ? OFFSET ?"
    runs = dicts(db, listed, [*values, *order_values, query.limit, query.offset])
    keys = [run["number"] for run in runs]
    if query.column:
        columns = read_values(db, keys, {c: parse_key(c, True) for c in query.column})
        for run in runs:
            run["values"] = columns[run["number"]]
    else:
        summaries, configs = _summaries(db, keys), _configs(db, keys)
        for run in runs:
            run["summary"] = summaries[run["number"]]
            run["config"] = _shortened(flatten(configs[run["number"]]))
    names = search.count_names(db, (where, values)) if query.names else {}
    return {"runs": runs, "total": total, **names}


def _where(db: Connection, query: RunQuery) -> Condition:
    conditions = [search.search_condition(db, parse_search(query.q))]
    if ids := [one for one in query.ids.split(",") if one]:
        conditions.append((f"run.id IN ({marks(ids)})", ids))
    for column, chosen in (("deleted", query.deleted), ("archived", query.archived)):
        if chosen != "any" and not ids:
            conditions.append((f"coalesce(run.{column}, 0) != 0 = ?", [chosen == "true"]))
    for column, value in (("project", query.project), ("group_name", query.group)):
        if value is not None:
            conditions.append((f"run.{column} = ?", [value]))
    values = [value for _, given in conditions for value in given]
    return " AND ".join(text for text, _ in conditions), values


def _summaries(db: Connection, keys: list[int]) -> dict[int, dict[str, Any]]:
    """Return each run's last values; what is not finite is the string that stands for it."""
    found: dict[int, dict[str, Any]] = {key: {} for key in keys}
    query = f"SELECT run, name, coalesce(last_text, last) FROM metric WHERE run IN ({marks(keys)})"
    for run, name, last in db.execute(f"{query} ORDER BY name", keys):
        found[run][name] = last
    return found


def _configs(db: Connection, keys: list[int]) -> dict[int, dict[str, Any]]:
    """Return each run's configuration: its sessions' joined, where the latest to arrive wins."""
    found: dict[int, dict[str, Any]] = {key: {} for key in keys}
    query = f"SELECT run, config FROM session WHERE run IN ({marks(keys)}) AND kind != ?"
    for run, config in db.execute(f"{query} ORDER BY pk", [*keys, SYSTEM]):
        found[run] |= orjson.loads(config)
    return found


def _shortened(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that fits a row of a list."""
    short = {
        key: value[:SHORT_CONFIG_CHARS] if isinstance(value, str) else value
        for key, value in config.items()
        if value is None or isinstance(value, str | int | float)
    }
    return dict(islice(short.items(), SHORT_CONFIG_KEYS))


def show_run(db: Connection, run: str) -> dict[str, Any]:
    """Return all that is known of a run but its points, texts and tables; or raise 404."""
    pk = find_run(db, run)
    metrics = "name, count, coalesce(last_text, last) AS last, min, max, last_step"
    shown = {
        **dicts(db, f"SELECT {RUN_COLUMNS} FROM run WHERE pk=?", (pk,))[0],
        "summary": _summaries(db, [pk])[pk],
        "config": _configs(db, [pk])[pk],
        "sessions": list_sessions(db, pk),
        "metrics": dicts(db, f"SELECT {metrics} FROM metric WHERE run=? ORDER BY name", (pk,)),
        "checkpoints": list_checkpoints(db, pk),
    }
    for key, table in (("texts", "text"), ("tables", "data_table"), ("media", "media")):
        names = db.execute(f"SELECT DISTINCT name FROM {table} WHERE run=? ORDER BY name", (pk,))
        shown[key] = [name for (name,) in names]
    return shown


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
        return {**given, "tags": kept}


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
        update(db, "run", pk, **changes.columns(orjson.loads(tags)))
    return statuses


def list_sessions(db: Connection, run: int) -> list[dict[str, Any]]:
    """Return how each session of a run stands, in the order of arrival."""
    columns = "id AS session, kind, offset, damaged_lines, status, last_seen, unsent_bytes"
    query = f"SELECT {columns}, rank, host, started FROM session WHERE run=? ORDER BY pk"
    return dicts(db, query, (run,))


def list_checkpoints(db: Connection, run: int) -> list[dict[str, Any]]:
    """Return a run's checkpoints by step, without those that were removed.

    Of one that is `announced` only the journal speaks.
    """
    columns = "name, step, created, state, bytes, aliases, metadata, error"
    query = f"SELECT {columns} FROM checkpoint WHERE run=? AND state != ? ORDER BY step, created"
    found = dicts(db, query, (run, REMOVED))
    move_aliases(found)
    return found


def list_alerts(db: Connection, run: str | None, open_only: bool) -> list[dict[str, Any]]:
    """Return the latest alerts, newest first; an open one is neither resolved nor dismissed."""
    return dicts(
        db,
        "SELECT alert.pk AS id, run.id AS run, run.name AS run_name, kind, metric, message, "
        f"opened, resolved, dismissed, {OPEN} AS open "
        "FROM alert LEFT JOIN run ON run.pk = alert.run "
        "WHERE coalesce(run.id = :run, :run IS NULL) AND (NOT :open OR open) "
        f"ORDER BY alert.pk DESC LIMIT {MOST_ALERTS}",
        {"run": run, "open": open_only},
    )


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
    size = len(orjson.dumps(content).decode())
    if size > MAX_SETTING_BYTES:
        raise ApiError(422, f"{name!r} has {size:,} characters; at most {MAX_SETTING_BYTES:,}")
    query = "SELECT count(*) FROM setting WHERE project=? AND kind=?"
    if db.execute(query, (project, kind)).fetchone()[0] >= MOST_SETTINGS:
        raise ApiError(422, f"there are {MOST_SETTINGS} of kind {kind} already: delete some")
    about = {"project": project, "kind": kind, "name": name, "content": content}
    insert(db, "setting", "INSERT OR REPLACE", changed=time.time(), **about)
