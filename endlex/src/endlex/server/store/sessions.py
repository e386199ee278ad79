"""Sessions and the runs they belong to, as the rows that a batch of journal lines changes."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from typing import Any

import orjson

from endlex.protocol import (
    CONFIG,
    CRASHED,
    LOST,
    SYSTEM,
    TRAINER,
    EndlexError,
)
from endlex.server.errors import ApiError
from endlex.server.store.config import store_config
from endlex.server.store.records import Batch, Record, check_session


@dataclass(frozen=True)
class SessionState:
    """What the writer needs to know of a session; `pk` is 0 for one that is not there yet."""

    pk: int
    run: int
    kind: str
    offset: int
    status: str


def find_session(connection: sqlite3.Connection, run: str, session: str) -> SessionState:
    """Return what is known of a session; an unknown one is at offset 0."""
    row = connection.execute(
        "SELECT session.pk, run, kind, offset, session.status FROM session "
        "JOIN run ON run.pk = session.run WHERE run.id=? AND session.id=?",
        (run, session),
    ).fetchone()
    return SessionState(*row) if row else SessionState(0, 0, TRAINER, 0, "running")


def require_session(connection: sqlite3.Connection, run: str, session: str) -> SessionState:
    """Return a session that is there.

    Raises:
        ApiError: 404, nothing of it has arrived.
    """
    state = find_session(connection, run, session)
    if state.pk == 0:
        raise ApiError(404, f"session {session!r} of run {run!r} is not here: send it from byte 0")
    return state


def begin_session(
    connection: sqlite3.Connection, run: str, session: str, first: bytes
) -> SessionState:
    """Make the rows of a session, and of its run where it is the first.

    Args:
        first: the journal's first line, which says whose session it is.

    Raises:
        ApiError: 422, it does not say that.
    """
    try:
        record = check_session(orjson.loads(first), run, session)
    except (ValueError, KeyError, TypeError, EndlexError) as error:
        raise ApiError(422, f"cannot begin session {session}: {error}") from error
    now = time.time()
    group, notes, host = (_text(record.get(key)) for key in ("group", "notes", "host"))
    facts = (record["project"], record["name"], group, notes)
    connection.execute(
        "INSERT OR IGNORE INTO run (id, project, name, group_name, notes, tags, host, created, "
        "updated) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (run, *facts, orjson.dumps(_tags(record)).decode(), host, record["time"], now),
    )
    run_pk = connection.execute("SELECT pk FROM run WHERE id=?", (run,)).fetchone()[0]
    if record.get("kind") != SYSTEM:
        store_config(connection, run_pk, record.get("config") or {})
    return _insert_session(connection, run_pk, session, record, now)


def _insert_session(
    connection: sqlite3.Connection, run: int, session: str, record: Record, now: float
) -> SessionState:
    kind = record.get("kind", TRAINER)
    rank, pid = (v if type(v) is int else None for v in (record.get("rank"), record.get("pid")))
    config, host = orjson.dumps(record.get("config") or {}).decode(), _text(record.get("host"))
    pk = connection.execute(
        "INSERT INTO session (run, id, kind, rank, host, pid, config, started, last_seen) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (run, session, kind, rank or 0, host, pid, config, record["time"], now),
    ).lastrowid
    assert pk is not None
    return SessionState(pk, run, kind, 0, "running")


def _text(value: Any) -> str | None:
    return value[:10_000] if isinstance(value, str) else None


def _tags(record: Record) -> list[str]:
    tags = record.get("tags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def advance_session(
    connection: sqlite3.Connection, state: SessionState, reached: int, batch: Batch
) -> None:
    """Note that a session is here up to `reached`, with what the new lines say of it."""
    for record in batch.records[CONFIG]:
        if state.kind != SYSTEM:
            store_config(connection, state.run, record["config"])
        query = "SELECT config FROM session WHERE pk=?"
        known = orjson.loads(connection.execute(query, (state.pk,)).fetchone()[0])
        merged = orjson.dumps(known | record["config"]).decode()
        connection.execute("UPDATE session SET config=? WHERE pk=?", (merged, state.pk))
    # Bytes from a session that was taken for dead show that it is not.
    status = "running" if state.status in (CRASHED, LOST) else state.status
    if batch.finish:
        status = batch.finish["status"]
    now = time.time()
    connection.execute(
        "UPDATE session SET offset=?, damaged_lines=damaged_lines+?, last_seen=?, heard=?, "
        "status=? WHERE pk=?",
        (reached, batch.damaged, now, now, status, state.pk),
    )


def was_resumed(connection: sqlite3.Connection, state: SessionState) -> bool:
    """Whether a later trainer has the session's place: one that is told of late is no news."""
    query = (
        "SELECT 1 FROM session JOIN session AS later ON later.run = session.run "
        "AND later.kind = session.kind AND later.rank = session.rank AND later.pk > session.pk "
        "WHERE session.pk = ? LIMIT 1"
    )
    return connection.execute(query, (state.pk,)).fetchone() is not None


def update_run(connection: sqlite3.Connection, run: int, now: float | None = None) -> str:
    """Give a run the status of its newest trainer (the lowest rank of the newest), and the time.

    Args:
        now: the time, if it is another one.
    """
    row = connection.execute(
        "SELECT status FROM session WHERE run=? ORDER BY kind=?, rank=0 DESC, pk DESC LIMIT 1",
        (run, SYSTEM),
    ).fetchone()
    status: str = row[0] if row else "running"
    values = (time.time() if now is None else now, status, run)
    connection.execute("UPDATE run SET updated=?, status=? WHERE pk=?", values)
    return status
