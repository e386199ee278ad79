"""What the pages and commands ask about runs: lists, one run whole, its parts, alerts."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from endlex.protocol import REMOVED, SYSTEM
from endlex.search import flatten, parse_key, parse_search
from endlex.server.errors import ApiError
from endlex.server.store.search import (
    COLUMNS,
    Condition,
    checked_condition,
    count_names,
    read_values,
    require_names,
    sort_expression,
)

SHORT_CONFIG_KEYS = 200
SHORT_CONFIG_CHARS = 100
RUN_COLUMNS = (
    "run.pk, run.id, project, name, status, created, updated, tags, group_name, notes, archived, "
    "deleted, host, color"
)
RUN_KEYS = (
    *("number", "run", "project", "name", "status", "created", "updated", "tags", "group"),
    *("notes", "archived", "deleted", "host", "color"),
)


@dataclass(frozen=True)
class RunQuery:
    """Which runs, in which order; `sort` is a key (`endlex.search`), with "-" in front descending.

    `archived` and `deleted`: "true" for those alone, "any" for those too; otherwise neither.
    With `columns`, a run has the values of these keys in place of its summary and configuration.
    """

    q: str = ""
    project: str | None = None
    group: str | None = None
    sort: str = "-created"
    archived: str | None = None
    deleted: str | None = None
    limit: int = 100
    offset: int = 0
    columns: tuple[str, ...] = ()
    names: bool = False
    """Whether to tell which metrics and configuration keys all the runs found have."""
    ids: tuple[str, ...] = ()
    """These runs alone, archived or not."""


def find_run(connection: sqlite3.Connection, run: str) -> int:
    """Return a run's key.

    Raises:
        ApiError: 404, there is none of that id.
    """
    row = connection.execute("SELECT pk FROM run WHERE id=?", (run,)).fetchone()
    if row is None:
        raise ApiError(404, f"there is no run {run[:40]!r} here: `endlex ls` lists them")
    pk: int = row[0]
    return pk


def list_runs(connection: sqlite3.Connection, query: RunQuery) -> dict[str, Any]:
    """Return the runs that match, and how many there are beyond the limit.

    Raises:
        EndlexError: the search is not one, or names what no run has.
    """
    where, values = _where(connection, query)
    total = connection.execute(f"SELECT count(*) FROM run WHERE {where}", values).fetchone()[0]
    order, order_values = _order(connection, query.sort)
    rows = connection.execute(
        f"SELECT {RUN_COLUMNS} FROM run WHERE {where} ORDER BY {order} LIMIT ? OFFSET ?",
        [*values, *order_values, query.limit, query.offset],
    ).fetchall()
    keys = [row[0] for row in rows]
    alerts = _alert_counts(connection, keys)
    if query.columns:
        columns = read_values(connection, keys, {c: parse_key(c, True) for c in query.columns})
        more = {key: {"values": columns[key]} for key in keys}
    else:
        summaries, configs = _summaries(connection, keys), _configs(connection, keys)
        more = {
            key: {
                "summary": summaries.get(key, {}),
                "config": _shortened(flatten(configs.get(key, {}))),
            }
            for key in keys
        }
    runs = [{**_run_row(row), **more[row[0]], "alerts": alerts.get(row[0], 0)} for row in rows]
    found = {"runs": runs, "total": total}
    return found | (count_names(connection, (where, values)) if query.names else {})


def _where(connection: sqlite3.Connection, query: RunQuery) -> Condition:
    conditions = [checked_condition(connection, parse_search(query.q))]
    if query.ids:
        conditions.append((f"run.id IN ({','.join('?' * len(query.ids))})", list(query.ids)))
    else:
        conditions += _state_conditions(query)
    for column, value in (("run.project", query.project), ("run.group_name", query.group)):
        if value is not None:
            conditions.append((f"{column} = ?", [value]))
    values = [value for _, given in conditions for value in given]
    return " AND ".join(text for text, _ in conditions), values


def _state_conditions(query: RunQuery) -> Iterable[Condition]:
    if query.deleted == "true":
        yield "run.deleted IS NOT NULL", []
    elif query.deleted != "any":
        yield "run.deleted IS NULL", []
    if query.archived != "any":
        yield "run.archived = ?", [int(query.archived == "true")]


def _order(connection: sqlite3.Connection, sort: str) -> Condition:
    """Return an ORDER BY expression and its values; runs without the key come last."""
    name = sort.removeprefix("-")
    key = parse_key(name, True)
    if name not in COLUMNS:
        require_names(connection, [key])
    expression, values = sort_expression(key, name)
    direction = "DESC" if sort.startswith("-") else "ASC"
    return f"{expression} {direction} NULLS LAST, run.pk DESC", values


def _run_row(row: tuple[Any, ...]) -> dict[str, Any]:
    run = dict(zip(RUN_KEYS, row, strict=True))
    return run | {"tags": orjson.loads(run["tags"]), "archived": bool(run["archived"])}


def _marks(keys: list[int]) -> str:
    return ",".join("?" * len(keys))


def _summaries(connection: sqlite3.Connection, keys: list[int]) -> dict[int, dict[str, Any]]:
    """Return each run's last values; what is not finite is the string that stands for it."""
    found: dict[int, dict[str, Any]] = {}
    rows = connection.execute(
        f"SELECT run, name, coalesce(last_text, last) FROM metric WHERE run IN ({_marks(keys)}) "
        "ORDER BY name",
        keys,
    )
    for run, name, last in rows:
        found.setdefault(run, {})[name] = last
    return found


def _alert_counts(connection: sqlite3.Connection, keys: list[int]) -> dict[int, int]:
    rows = connection.execute(
        f"SELECT run, count(*) FROM alert WHERE run IN ({_marks(keys)}) "
        "AND resolved IS NULL AND dismissed IS NULL GROUP BY run",
        keys,
    )
    return dict(rows.fetchall())


def _configs(connection: sqlite3.Connection, keys: list[int]) -> dict[int, dict[str, Any]]:
    """Return each run's configuration: its sessions' joined, where the latest to arrive wins."""
    found: dict[int, dict[str, Any]] = {}
    rows = connection.execute(
        f"SELECT run, config FROM session WHERE run IN ({_marks(keys)}) AND kind != ? ORDER BY pk",
        [*keys, SYSTEM],
    )
    for run, config in rows:
        found.setdefault(run, {}).update(orjson.loads(config))
    return found


def _shortened(config: dict[str, Any]) -> dict[str, Any]:
    """Return what of a configuration fits a row of a list."""
    short: dict[str, Any] = {}
    for key, value in config.items():
        if len(short) == SHORT_CONFIG_KEYS:
            break
        if isinstance(value, str):
            short[key] = value[:SHORT_CONFIG_CHARS]
        elif value is None or isinstance(value, int | float):
            short[key] = value
    return short


def show_run(connection: sqlite3.Connection, run: str) -> dict[str, Any]:
    """Return all that is known of a run but its points, texts and tables.

    Raises:
        ApiError: 404.
    """
    pk = find_run(connection, run)
    row = connection.execute(f"SELECT {RUN_COLUMNS} FROM run WHERE pk=?", (pk,)).fetchone()
    return {
        **_run_row(row),
        "summary": _summaries(connection, [pk]).get(pk, {}),
        "alerts": _alert_counts(connection, [pk]).get(pk, 0),
        "config": _configs(connection, [pk]).get(pk, {}),
        "sessions": list_sessions(connection, pk),
        "metrics": list_metrics(connection, pk),
        "texts": _names(connection, "text", pk),
        "tables": _names(connection, "data_table", pk),
        "media": _names(connection, "media", pk),
        "checkpoints": list_checkpoints(connection, pk),
    }


def _dicts(
    connection: sqlite3.Connection, query: str, values: Sequence[Any]
) -> list[dict[str, Any]]:
    """Return rows by the names of their columns."""
    cursor = connection.execute(query, values)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def list_sessions(connection: sqlite3.Connection, run: int) -> list[dict[str, Any]]:
    """Return how each session of a run stands, in the order of arrival."""
    query = (
        "SELECT id AS session, kind, offset, damaged_lines, status, last_seen, unsent_bytes, "
        "rank, host, started FROM session WHERE run=? ORDER BY pk"
    )
    return _dicts(connection, query, (run,))


def list_metrics(connection: sqlite3.Connection, run: int) -> list[dict[str, Any]]:
    """Return the summary of each metric of a run, by name."""
    query = (
        "SELECT name, count, coalesce(last_text, last) AS last, min, max, last_step FROM metric "
        "WHERE run=? ORDER BY name"
    )
    return _dicts(connection, query, (run,))


def list_checkpoints(connection: sqlite3.Connection, run: int) -> list[dict[str, Any]]:
    """Return a run's checkpoints by step, without those that were removed.

    Of one that is `announced` only the journal speaks.
    """
    query = (
        "SELECT name, step, created, state, bytes, aliases, metadata, error FROM checkpoint "
        "WHERE run=? AND state != ? ORDER BY step, created"
    )
    found = _dicts(connection, query, (run, REMOVED))
    for checkpoint in found:
        for key in ("aliases", "metadata"):
            checkpoint[key] = orjson.loads(checkpoint[key])
    return found


def _names(connection: sqlite3.Connection, table: str, run: int) -> list[str]:
    rows = connection.execute(
        f"SELECT DISTINCT name FROM {table} WHERE run=? ORDER BY name", (run,)
    )
    return [name for (name,) in rows]


def list_alerts(
    connection: sqlite3.Connection, run: str | None, open_only: bool, limit: int = 500
) -> list[dict[str, Any]]:
    """Return alerts, newest first; an open one is neither resolved nor dismissed."""
    where, values = "1", []
    if run is not None:
        where, values = "run.id = ?", [run]
    if open_only:
        where += " AND resolved IS NULL AND dismissed IS NULL"
    found = _dicts(
        connection,
        "SELECT alert.pk AS id, run.id AS run, run.name AS run_name, kind, metric, message, "
        "opened, resolved, dismissed "
        f"FROM alert LEFT JOIN run ON run.pk = alert.run WHERE {where} "
        "ORDER BY alert.pk DESC LIMIT ?",
        [*values, limit],
    )
    for alert in found:
        alert["open"] = alert["resolved"] is None and alert["dismissed"] is None
    return found
