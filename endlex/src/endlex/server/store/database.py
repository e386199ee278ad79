"""The embedded database: one writer thread, a reader connection per thread, and the schema.

SQLite in WAL mode with `synchronous=FULL`: a commit is on the disk before it is acknowledged, so
an acknowledged offset survives a power cut. All writing happens in one thread that takes jobs
from a queue; jobs that wait together share one commit (and one fsync), each in a savepoint of its
own, so that a failing one takes no other with it. Readers never wait for the writer.
"""

from __future__ import annotations

import asyncio
import queue
import re
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from sqlite3 import Connection
from typing import Any, ParamSpec, TypeVar

import orjson

from endlex.client.process import warn_once
from endlex.protocol import EndlexError
from endlex.server.store.search import fill_config, marks

P = ParamSpec("P")
T = TypeVar("T")
Job = tuple[Callable[[Connection], Any], "Future[Any]"]

SCHEMA = Path(__file__).with_name("schema.sql")
SCHEMA_VERSION = 5
MOST_JOBS_IN_A_COMMIT = 32

UPGRADES = {
    2: "ALTER TABLE checkpoint ADD COLUMN removed REAL;"
    "ALTER TABLE checkpoint ADD COLUMN reason TEXT;",
    3: "ALTER TABLE token ADD COLUMN runs_before INTEGER NOT NULL DEFAULT 0;"
    "ALTER TABLE session ADD COLUMN heard REAL;"
    # Boxes that are at work keep sending: nobody knows which token sent which of these runs.
    "UPDATE token SET runs_before = (SELECT coalesce(max(pk), -1) FROM run);",
    4: "ALTER TABLE run ADD COLUMN color TEXT;",
}
"""What each version changed in tables that were there before; new ones are in `SCHEMA`."""

JSON = frozenset({"tags", "aliases", "metadata", "config", "manifest", "content"})
"""Columns that hold JSON."""
FLAGS = frozenset({"archived", "open", "older_runs"})
"""Columns that hold 0 or 1."""


def connect(path: Path, *, read_only: bool = False) -> Connection:
    """Open the database in autocommit mode, for use by one thread at a time.

    One that a later version of Endlex made is an `EndlexError`.
    """
    db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    db.create_collation("PEOPLE", compare_natural)
    if read_only:
        db.execute("PRAGMA query_only=ON")
        return db
    try:
        path.chmod(0o600)
    except PermissionError:  # exFAT and the like have no owners
        warn_once(f"{path} cannot be made private: its file system has no permissions")
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "journal_size_limit=67108864"):
        db.execute(f"PRAGMA {pragma}")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        db.close()
        raise EndlexError(
            f"{path} has schema {version}, and this version of Endlex knows {SCHEMA_VERSION}: "
            "upgrade endlex"
        )
    if version < SCHEMA_VERSION:
        _bring_up_to_date(db, version)
    return db


def compare_natural(left: str, right: str) -> int:
    """Compare texts as people order them: d8 before d12, and a beside A."""
    a, b = (
        [(not part.isdigit(), int(part) if part.isdigit() else 0, part.lower()) for part in parts]
        for parts in (re.findall(r"[0-9]+|[^0-9]+", text) for text in (left, right))
    )
    return (a > b) - (a < b)


def _bring_up_to_date(db: Connection, version: int) -> None:
    """Make the tables, or change those of an earlier version; all of it or nothing."""
    changes = "".join(sql for number, sql in UPGRADES.items() if 0 < version < number)
    changes += f"{SCHEMA.read_text(encoding='utf-8')}PRAGMA user_version={SCHEMA_VERSION};"
    try:
        db.executescript(f"BEGIN IMMEDIATE;{changes}COMMIT;")
        if 0 < version < 4:
            fill_config(db)
    except sqlite3.OperationalError as error:  # another process was first
        if "duplicate column" not in str(error):
            raise
        db.execute("ROLLBACK")


def dicts(
    db: Connection, query: str, values: Sequence[Any] | dict[str, Any] = ()
) -> list[dict[str, Any]]:
    """Return rows by the names of their columns, decoded."""
    cursor = db.execute(query, values)
    names = [column[0] for column in cursor.description]
    found = [dict(zip(names, row, strict=True)) for row in cursor]
    for row in found:
        row.update({key: orjson.loads(row[key]) for key in JSON & row.keys()})
        row.update({key: bool(row[key]) for key in FLAGS & row.keys()})
    return found


def insert(db: Connection, table: str, verb: str = "INSERT", /, **values: Any) -> int:
    """Insert a row, encoded, and return its key."""
    query = f"{verb} INTO {table} ({', '.join(values)}) VALUES ({marks(values)})"
    return db.execute(query, _encoded(values)).lastrowid or 0


def update(db: Connection, table: str, pk: int, /, **values: Any) -> None:
    """Set columns of a row, encoded."""
    query = f"UPDATE {table} SET {', '.join(f'{column}=?' for column in values)} WHERE pk=?"
    db.execute(query, [*_encoded(values), pk])


def _encoded(values: dict[str, Any]) -> list[Any]:
    return [orjson.dumps(v).decode() if key in JSON else v for key, v in values.items()]


class Pool(ThreadPoolExecutor):
    """Some threads; calling it runs a function in one of them."""

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.wrap_future(self.submit(function, *args, **kwargs))


class Database:
    """The open database of one server; its file is made if missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._local = threading.local()
        self._readers: list[Connection] = []
        self._closed = False
        self._lock = threading.Lock()
        self._writer = connect(path)
        self._thread = threading.Thread(target=self._work, name="endlex-writer", daemon=True)
        self._thread.start()

    def reader(self) -> Connection:
        """Return this thread's own connection, which cannot write."""
        db: Connection | None = getattr(self._local, "db", None)
        if db is None:
            db = self._local.db = connect(self.path, read_only=True)
            with self._lock:
                self._readers.append(db)
        return db

    def ask(self, question: Callable[[Connection], T]) -> T:
        """Return the answer to a question, in this thread: all it reads is of one moment."""
        db = self.reader()
        db.execute("BEGIN")
        try:
            return question(db)
        finally:
            db.execute("COMMIT")

    def write(self, job: Callable[[Connection], T]) -> Future[T]:
        """Run `job` in the writer's thread; the future resolves once its changes are on the disk.

        What the job raises undoes its changes alone, and is the future's exception. A job whose
        future is cancelled before its turn does not run.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise EndlexError("the server is shutting down: try again")
            self._jobs.put((job, future))
        return future

    def close(self) -> None:
        """Finish the jobs that wait, then close every connection."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._jobs.put(None)
        self._thread.join()
        self._writer.close()
        for reader in self._readers:
            reader.close()

    def _work(self) -> None:
        taken: list[Job | None] = []
        while None not in taken:
            taken = [self._jobs.get()]
            while len(taken) < MOST_JOBS_IN_A_COMMIT and not self._jobs.empty():
                taken.append(self._jobs.get())
            self._commit([job for job in taken if job is not None])

    def _commit(self, jobs: list[Job]) -> None:
        done: list[tuple[Future[Any], Any]] = []
        # A caller that waits may be cancelled, as the sweep is at shutdown, and its job too. From
        # here on none can be: a result that nobody takes must not end the only writer there is.
        jobs = [job for job in jobs if job[1].set_running_or_notify_cancel()]
        if not jobs:
            return
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for job, future in jobs:
                self._writer.execute("SAVEPOINT job")
                try:
                    done.append((future, job(self._writer)))
                except Exception as error:
                    if not self._writer.in_transaction:  # a full disk undoes everything at once
                        raise
                    self._writer.execute("ROLLBACK TO job")
                    future.set_exception(error)
                self._writer.execute("RELEASE job")
            self._writer.execute("COMMIT")
        except BaseException as error:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            for _, future in jobs:
                if not future.done():
                    future.set_exception(error)
        else:
            for future, result in done:
                future.set_result(result)
