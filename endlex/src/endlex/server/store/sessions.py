"""Sessions: their rows and their runs', as batches of journal lines change them, and their bytes.

A journal is kept byte for byte as the training box has it, whatever it says, in compressed
segments. Everything else in the database can be made from it. Short segments grow, so that a run
that logs once a second does not leave a row for every second.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import zlib
from functools import partial
from sqlite3 import Connection
from typing import Annotated, Any, Literal, NamedTuple

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, FiniteFloat, ValidationError

from endlex.protocol import CONFIG, CRASHED, LOST, PROTOCOL, SYSTEM, TRAINER, check_name
from endlex.server.errors import ApiError
from endlex.server.events import Event
from endlex.server.store.database import insert, update
from endlex.server.store.records import Batch
from endlex.server.store.search import store_config

MOST_TEXT_CHARS = 10_000
TOO_DEEP = "(nested too deeply to be shown)"


def _as_text(value: Any) -> str | None:
    try:
        return None if value is None else str(value)[:MOST_TEXT_CHARS]
    except RecursionError:
        return TOO_DEEP


def _as_texts(value: Any) -> list[str]:
    return [_as_text(item) or "" for item in value] if isinstance(value, list) else []


def _as_config(value: Any) -> dict[str, Any] | None:
    """Return a dictionary that can be stored as JSON; whatever is none becomes one text in it."""
    with contextlib.suppress(TypeError):  # it is nested too deeply
        if value is None or (isinstance(value, dict) and orjson.dumps(value)):
            return value
    return {CONFIG: _as_text(value)}


def _as_number(value: Any) -> int | None:
    return value if type(value) is int and abs(value) < 2**63 else None


Text = Annotated[str | None, BeforeValidator(_as_text)]
Number = Annotated[int | None, BeforeValidator(_as_number)]


class SessionRecord(BaseModel):
    """The first record of a journal, as far as the server reads it (`protocol`).

    A field that may be missing takes any value, except `kind`: refusing the record would refuse the
    whole run.
    """

    type: Literal["session"]
    protocol: int
    run: str
    session: str
    time: FiniteFloat
    project: Annotated[str, AfterValidator(partial(check_name, what="project"))]
    name: Annotated[str, AfterValidator(partial(check_name, what="run name"))]
    kind: Literal["trainer", "system"] = "trainer"
    config: Annotated[dict[str, Any] | None, BeforeValidator(_as_config)] = None
    tags: Annotated[list[str], BeforeValidator(_as_texts)] = []
    group: Text = None
    notes: Text = None
    host: Text = None
    rank: Number = None
    pid: Number = None


class SessionState(NamedTuple):
    """What the writer needs to know of a session; `pk` is 0 for one that is not there yet."""

    pk: int
    run: int
    kind: str
    offset: int
    status: str


def find_session(db: Connection, run: str, session: str) -> SessionState:
    """Return what is known of a session; an unknown one is at offset 0."""
    row = db.execute(
        "SELECT session.pk, run, kind, offset, session.status FROM session "
        "JOIN run ON run.pk = session.run WHERE run.id=? AND session.id=?",
        (run, session),
    ).fetchone()
    return SessionState(*(row or (0, 0, TRAINER, 0, "running")))


def require_session(db: Connection, run: str, session: str) -> SessionState:
    """Return a session; one of which nothing has arrived is an `ApiError` 404."""
    state = find_session(db, run, session)
    if state.pk == 0:
        raise ApiError(404, f"session {session!r} of run {run!r} is not here: send it from byte 0")
    return state


def begin_session(db: Connection, run: str, session: str, first: bytes) -> SessionState:
    """Make the rows of a session, and of its run where it is the first.

    `first` is the journal's first line; one that is not its session's record is an `ApiError` 422.
    """
    record = _check_first(first, run, session)
    now, config = time.time(), record.config or {}
    about = record.model_dump(include={"project", "name", "notes", "tags", "host"})
    times = {"created": record.time, "updated": now}
    insert(db, "run", "INSERT OR IGNORE", id=run, group_name=record.group, **about, **times)
    (run_pk,) = db.execute("SELECT pk FROM run WHERE id=?", (run,)).fetchone()
    if record.kind != SYSTEM:
        store_config(db, run_pk, config)
    about = record.model_dump(include={"kind", "host", "pid"})
    about |= {"rank": record.rank or 0, "config": config}
    pk = insert(db, "session", run=run_pk, id=session, started=record.time, last_seen=now, **about)
    return SessionState(pk, run_pk, record.kind, 0, "running")


def _check_first(line: bytes, run: str, session: str) -> SessionRecord:
    try:
        # By orjson, as all other records: whole numbers beyond 64 bits become floats.
        record = SessionRecord.model_validate(orjson.loads(line))
    except ValueError as error:
        wrong = error.errors()[0] if isinstance(error, ValidationError) else None
        said = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}" if wrong else str(error)
        what = f"the first line of session {session} is not its session record"
        raise ApiError(422, f"{what}: {said}") from error
    if record.protocol != PROTOCOL:
        message = f"the session speaks protocol {record.protocol}, and this server {PROTOCOL}"
        raise ApiError(422, f"{message}: upgrade the older side")
    if (record.run, record.session) != (run, session):
        message = f"the record is of session {record.session} of run {record.run}"
        raise ApiError(422, f"{message}, and it was sent as {session} of {run}")
    return record


def advance_session(db: Connection, state: SessionState, reached: int, batch: Batch) -> None:
    """Record that a session is stored up to byte `reached`, and what the new lines say of it."""
    for record in batch.records[CONFIG]:
        if state.kind != SYSTEM:
            store_config(db, state.run, record["config"])
        (known,) = db.execute("SELECT config FROM session WHERE pk=?", (state.pk,)).fetchone()
        update(db, "session", state.pk, config=orjson.loads(known) | record["config"])
    # Bytes from a session that was taken for dead show that it is not.
    status = "running" if state.status in (CRASHED, LOST) else state.status
    if batch.finish:
        status = batch.finish["status"]
    now = time.time()
    db.execute(
        "UPDATE session SET offset=?, damaged_lines=damaged_lines+?, last_seen=?, heard=?, "
        "status=? WHERE pk=?",
        (reached, batch.damaged, now, now, status, state.pk),
    )


def was_resumed(db: Connection, state: SessionState) -> bool:
    """Whether a later session has resumed this one, so that its end is no news."""
    query = (
        "SELECT 1 FROM session JOIN session AS later USING (run, kind, rank) "
        "WHERE session.pk = ? AND later.pk > session.pk LIMIT 1"
    )
    return db.execute(query, (state.pk,)).fetchone() is not None


def update_run(db: Connection, run: int, now: float | None = None) -> Event:
    """Set a run's status to that of its newest trainer session, of the lowest rank; return news."""
    name, status, updated = db.execute(
        "UPDATE run SET updated=?, status=(SELECT status FROM session WHERE session.run=run.pk "
        "ORDER BY kind=?, rank=0 DESC, pk DESC LIMIT 1) WHERE pk=? RETURNING id, status, updated",
        (time.time() if now is None else now, SYSTEM, run),
    ).fetchone()
    return "run", {"run": name, "updated": updated, "status": status}


SHORT_SEGMENT = 64 * 1024
"""Bytes, uncompressed, below which a segment takes what comes next."""
LEVEL = 1


def append_segment(db: Connection, session: int, offset: int, body: bytes, data: bytes) -> None:
    """Store `body` (compressed: `data`) behind the `offset` bytes that are there."""
    if len(body) < SHORT_SEGMENT:
        query = "SELECT start, size, data FROM segment WHERE session=? ORDER BY start DESC LIMIT 1"
        last = db.execute(query, (session,)).fetchone()
        if last is not None and last[1] < SHORT_SEGMENT:
            offset, body = last[0], zlib.decompress(last[2]) + body
            data = zlib.compress(body, LEVEL)
    values = (session, offset, len(body), data)
    db.execute("INSERT OR REPLACE INTO segment VALUES (?, ?, ?, ?)", values)


def read_segment(db: Connection, session: int, start: int, end: int) -> bytes:
    """Return some of the journal's bytes from `start` up to `end`, which must be there."""
    query = (
        "SELECT start, data FROM segment WHERE session=? AND start<=? ORDER BY start DESC LIMIT 1"
    )
    row = db.execute(query, (session, start)).fetchone()
    content = zlib.decompress(row[1])[start - row[0] : end - row[0]] if row else b""
    if not content:
        raise RuntimeError(f"the journal of session {session} ends at {start}, before {end}")
    return content


def hash_journal(db: Connection, run: str, session: str, upto: int) -> dict[str, Any]:
    """Return a journal's length, and the SHA-256 of its first `upto` bytes, or of all of them."""
    state = require_session(db, run, session)
    digest, start = hashlib.sha256(), 0
    while start < min(upto, state.offset):
        content = read_segment(db, state.pk, start, min(upto, state.offset))
        digest.update(content)
        start += len(content)
    return {"offset": state.offset, "sha256": digest.hexdigest()}
