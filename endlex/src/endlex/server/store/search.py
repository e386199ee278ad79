"""Translate a search (`endlex.search`), a sort key and table columns into SQL.

Configurations are stored key by key, so that runs can be searched and sorted by them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from sqlite3 import Connection
from typing import Any

import orjson

from endlex.protocol import SYSTEM
from endlex.search import ANYWHERE, Key, Query, Term, check_names, flatten, parse_key, parse_number

Condition = tuple[str, list[Any]]

COLUMNS = {
    "name": "run.name",
    "project": "run.project",
    "group": "run.group_name",
    "status": "run.status",
    "host": "run.host",
    "notes": "run.notes",
    "id": "run.id",
    "created": "run.created",
    "updated": "run.updated",
    "duration": "(run.updated - run.created)",
    "tag": "run.tags",
    "tags": "run.tags",
}
LIKE = "LIKE ? ESCAPE '\\'"
FIGURES = {
    "last": "SELECT run, name, last AS number, last_text AS text FROM metric",
    "min": "SELECT run, name, min AS number, NULL AS text FROM metric",
    "max": "SELECT run, name, max AS number, NULL AS text FROM metric",
    "config": "SELECT run, key AS name, number, text FROM run_config",
}
"""Where the values of each kind of key are. What is not finite, or no number, is a text."""


def marks(values: Collection[Any]) -> str:
    """Return as many question marks as there are values, for `IN (...)`."""
    return ",".join("?" * len(values))


def search_condition(db: Connection, query: Query) -> Condition:
    """Return a search as a condition on the table `run`, with the values apart.

    A name that no run has is a `SearchError`.
    """
    require_names(db, [term.key for group in query for term in group if term.key])
    groups = [[_term(term) for term in group] for group in query]
    texts = ["(" + " OR ".join(text for text, _ in group) + ")" for group in groups]
    values = [value for group in groups for _, given in group for value in given]
    return " AND ".join(texts) or "1", values


def require_names(db: Connection, keys: list[Key]) -> None:
    """Raise a `SearchError` with the nearest names where no run has a key."""
    if keys := [key for key in keys if key.kind != "field"]:
        metrics = [n for (n,) in db.execute("SELECT DISTINCT name FROM metric")]
        config = [n for (n,) in db.execute("SELECT DISTINCT key FROM run_config")]
        check_names(keys, metrics, config)


def _kinds(key: Key) -> tuple[str, ...]:
    """Return the kinds of figures to look in; the first that has the name counts."""
    several = {"any": ("last", "config"), "field": ("last",)}
    return several.get(key.kind, (key.kind,))


def _term(term: Term) -> Condition:
    if term.key is None:
        found = " OR ".join(_in_field(field) for field in ANYWHERE)
        condition, values = f"({found})", [term.text.like(anywhere=True)] * len(ANYWHERE)
    elif term.key.kind == "field":
        condition = _in_field(str(term.key.name))
        condition = f"NOT {condition}" if term.operator == "!=" else condition
        values = [term.text.like()]
    else:
        test, given = _test(term)
        is_pattern = len(term.key.name.parts) > 1
        name = term.key.name.like() if is_pattern else str(term.key.name)
        named = LIKE if is_pattern else "= ? COLLATE NOCASE"  # which is faster
        kinds = _kinds(term.key)
        tests = ", ".join(
            f"(SELECT max(coalesce({test}, 0)) FROM ({FIGURES[kind]}) AS figure "
            f"WHERE figure.run = run.pk AND figure.name {named})"
            for kind in kinds
        )
        condition, values = f"coalesce({tests}, 0)", [*given, name] * len(kinds)
    return f"NOT {condition}" if term.negated else condition, values


def _in_field(field: str) -> str:
    if field == "tag":
        return f"EXISTS (SELECT 1 FROM json_each(run.tags) WHERE value {LIKE})"
    return f"coalesce({COLUMNS[field]} {LIKE}, 0)"


def _test(term: Term) -> Condition:
    """Return what a term asks of a row of `FIGURES`."""
    as_number = f"number {term.operator} ?"
    if term.operator not in ("=", "!="):
        return as_number, [term.number]
    # A number without a text is compared as the text that it is.
    as_text = f"coalesce(text, number) {'NOT ' if term.operator == '!=' else ''}{LIKE}"
    if term.number is None:
        return as_text, [term.text.like()]
    condition = f"CASE WHEN number IS NULL THEN {as_text} ELSE {as_number} END"
    return condition, [term.text.like(), term.number]


def sort_order(db: Connection, sort: str) -> Condition:
    """Return an ORDER BY expression and its values; runs without the key come last.

    A name that no run has is a `SearchError`.
    """
    name = sort.removeprefix("-")
    direction = "DESC" if sort.startswith("-") else "ASC"
    expression, values = COLUMNS.get(name, ""), list[Any]()
    if not expression:
        key = parse_key(name, True)
        require_names(db, [key])
        figures = ", ".join(
            f"(SELECT {'coalesce(number, text)' if kind == 'config' else 'number'} "
            f"FROM ({FIGURES[kind]}) AS figure WHERE figure.run = run.pk AND figure.name = ?)"
            for kind in _kinds(key)
        )
        expression, values = f"coalesce({figures}, NULL)", [str(key.name)] * len(_kinds(key))
    return f"{expression} COLLATE PEOPLE {direction} NULLS LAST, run.pk DESC", values


def read_values(db: Connection, runs: list[int], keys: dict[str, Key]) -> dict[int, dict[str, Any]]:
    """Return by run the values of columns; a metric comes before a key of the same name."""
    found: dict[int, dict[str, Any]] = {run: {} for run in runs}
    for column, key in keys.items():
        for kind in reversed(_kinds(key)):
            rows = db.execute(
                f"SELECT run, coalesce(number, text) FROM ({FIGURES[kind]}) "
                f"WHERE name = ? AND run IN ({marks(runs)})",
                [str(key.name), *runs],
            )
            for run, value in rows:
                found[run][column] = value
    return found


def count_names(db: Connection, where: Condition) -> dict[str, Any]:
    """Return the metrics of the runs found, with the number of runs that have each, and the keys
    of their configurations, with the number of runs and of different values; and every project."""
    condition, values = where
    chosen = f"run IN (SELECT pk FROM run WHERE {condition})"
    metrics = f"SELECT name, count(*) FROM metric WHERE {chosen} GROUP BY name ORDER BY name"
    config = (
        "SELECT key, count(*), count(DISTINCT coalesce(number, text)) FROM run_config "
        f"WHERE {chosen} GROUP BY key ORDER BY key"
    )
    projects = (
        "SELECT project, count(*) FROM run WHERE deleted IS NULL GROUP BY project ORDER BY project"
    )
    return {
        "metrics": db.execute(metrics, values).fetchall(),
        "config": db.execute(config, values).fetchall(),
        "projects": db.execute(projects).fetchall(),
    }


MAX_KEYS = 2000
"""Keys kept per record of a session."""
MAX_TEXT_CHARS = 1000


def store_config(db: Connection, run: int, config: Mapping[str, Any]) -> None:
    """Keep the leaves of a configuration for `endlex.search`, in place of earlier values."""
    rows = []
    for key, value in flatten(config).items():
        is_json = isinstance(value, list | dict)
        text = (orjson.dumps(value).decode() if is_json else str(value))[:MAX_TEXT_CHARS]
        rows.append((run, key, parse_number(text), text))
    db.executemany("INSERT OR REPLACE INTO run_config VALUES (?, ?, ?, ?)", rows[:MAX_KEYS])


def fill_config(db: Connection) -> None:
    """Fill the table in a database that was made before it existed."""
    rows = db.execute("SELECT run, config FROM session WHERE kind != ? ORDER BY pk", (SYSTEM,))
    for run, config in rows.fetchall():
        store_config(db, run, orjson.loads(config))
