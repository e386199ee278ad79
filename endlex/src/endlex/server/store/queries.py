"""Questions of the pages and commands: lists of runs, one run as a whole, alerts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from sqlite3 import Connection
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, Field

from endlex.protocol import REMOVED, SYSTEM
from endlex.search import flatten, parse_key, parse_search
from endlex.server.errors import ApiError
from endlex.server.store import search
from endlex.server.store.search import Condition, marks, read_values

SHORT_CONFIG_KEYS = 200
SHORT_CONFIG_CHARS = 100
MOST_ALERTS = 500
OPEN = "resolved IS NULL AND dismissed IS NULL"
"""The condition for an alert that is open."""
RUN_COLUMNS = f"""
    run.pk AS number, run.id AS run, project, name, status, created, updated, tags,
    group_name AS "group", notes, archived, deleted, host, color,
    (SELECT count(*) FROM alert WHERE alert.run = run.pk AND {OPEN}) AS alerts
"""
DECODED: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("tags", "aliases", "metadata"), orjson.loads),
    **dict.fromkeys(("archived", "open", "older_runs"), bool),
}
"""Columns that the database holds as JSON, or as 0 and 1."""


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
    order, order_values = _order(db, query.sort)
    runs = dicts(
        db,
        f"SELECT {RUN_COLUMNS} FROM run WHERE {where} ORDER BY {order} LIMIT ? OFFSET ?",
        [*values, *order_values, query.limit, query.offset],
    )
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
    found = {"runs": runs, "total": total}
    return found | (search.count_names(db, (where, values)) if query.names else {})


def _where(db: Connection, query: RunQuery) -> Condition:
    conditions = [search.search_condition(db, parse_search(query.q))]
    if ids := [one for one in query.ids.split(",") if one]:
        conditions.append((f"run.id IN ({marks(ids)})", ids))
    for state, chosen in (
        ("run.deleted IS NOT NULL", query.deleted),
        ("run.archived", query.archived),
    ):
        if chosen != "any" and not ids:
            conditions.append((f"({state}) = ?", [chosen == "true"]))
    for column, value in (("project", query.project), ("group_name", query.group)):
        if value is not None:
            conditions.append((f"run.{column} = ?", [value]))
    values = [value for _, given in conditions for value in given]
    return " AND ".join(text for text, _ in conditions), values


def _order(db: Connection, sort: str) -> Condition:
    """Return an ORDER BY expression and its values; runs without the key come last."""
    name = sort.removeprefix("-")
    key = parse_key(name, True)
    if name not in search.COLUMNS:
        search.require_names(db, [key])
    expression, values = search.sort_expression(key, name)
    direction = "DESC" if sort.startswith("-") else "ASC"
    return f"{expression} {direction} NULLS LAST, run.pk DESC", values


def _summaries(db: Connection, keys: list[int]) -> dict[int, dict[str, Any]]:
    """Return each run's last values; what is not finite is the string that stands for it."""
    found: dict[int, dict[str, Any]] = {key: {} for key in keys}
    query = (
        "SELECT run, name, coalesce(last_text, last) FROM metric WHERE run IN ({}) ORDER BY name"
    )
    for run, name, last in db.execute(query.format(marks(keys)), keys):
        found[run][name] = last
    return found


def _configs(db: Connection, keys: list[int]) -> dict[int, dict[str, Any]]:
    """Return each run's configuration: its sessions' joined, where the latest to arrive wins."""
    found: dict[int, dict[str, Any]] = {key: {} for key in keys}
    query = "SELECT run, config FROM session WHERE run IN ({}) AND kind != ? ORDER BY pk"
    for run, config in db.execute(query.format(marks(keys)), [*keys, SYSTEM]):
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
    return {
        **dicts(db, f"SELECT {RUN_COLUMNS} FROM run WHERE pk=?", (pk,))[0],
        "summary": _summaries(db, [pk])[pk],
        "config": _configs(db, [pk])[pk],
        "sessions": list_sessions(db, pk),
        "metrics": dicts(
            db,
            "SELECT name, count, coalesce(last_text, last) AS last, min, max, last_step "
            "FROM metric WHERE run=? ORDER BY name",
            (pk,),
        ),
        "texts": _names(db, "text", pk),
        "tables": _names(db, "data_table", pk),
        "media": _names(db, "media", pk),
        "checkpoints": list_checkpoints(db, pk),
    }


def dicts(
    db: Connection, query: str, values: Sequence[Any] | dict[str, Any] = ()
) -> list[dict[str, Any]]:
    """Return rows by the names of their columns, decoded."""
    cursor = db.execute(query, values)
    names = [column[0] for column in cursor.description]
    found = [dict(zip(names, row, strict=True)) for row in cursor]
    for row in found:
        row.update({key: DECODED[key](row[key]) for key in DECODED.keys() & row.keys()})
    return found


def list_sessions(db: Connection, run: int) -> list[dict[str, Any]]:
    """Return how each session of a run stands, in the order of arrival."""
    query = (
        "SELECT id AS session, kind, offset, damaged_lines, status, last_seen, unsent_bytes, "
        "rank, host, started FROM session WHERE run=? ORDER BY pk"
    )
    return dicts(db, query, (run,))


def list_checkpoints(db: Connection, run: int) -> list[dict[str, Any]]:
    """Return a run's checkpoints by step, without those that were removed.

    Of one that is `announced` only the journal speaks.
    """
    query = (
        "SELECT name, step, created, state, bytes, aliases, metadata, error FROM checkpoint "
        "WHERE run=? AND state != ? ORDER BY step, created"
    )
    return dicts(db, query, (run, REMOVED))


def _names(db: Connection, table: str, run: int) -> list[str]:
    rows = db.execute(f"SELECT DISTINCT name FROM {table} WHERE run=? ORDER BY name", (run,))
    return [name for (name,) in rows]


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
