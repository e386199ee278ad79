"""The embedded database: one writer thread, a reader connection per thread, and the schema.

SQLite in WAL mode with `synchronous=FULL`: a commit is on the disk before it is acknowledged, so
an acknowledged offset survives a power cut. All writing happens in one thread that takes jobs
from a queue; jobs that wait together share one commit (and one fsync), each in a savepoint of its
own, so that a failing one takes no other with it. Readers never wait for the writer.
"""

from __future__ import annotations

import queue
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from endlex.client.process import warn_once
from endlex.protocol import EndlexError
from endlex.server.store.config import fill_config
from endlex.server.store.media import SCHEMA as MEDIA

T = TypeVar("T")
Job = tuple[Callable[[sqlite3.Connection], Any], "Future[Any]"]

SCHEMA_VERSION = 5
MOST_JOBS_IN_A_COMMIT = 32

RUN_CONFIG = """
CREATE TABLE run_config (
    run INTEGER NOT NULL, key TEXT NOT NULL, number REAL, text TEXT NOT NULL, PRIMARY KEY (run, key)
) WITHOUT ROWID;
"""
SETTING = """
CREATE TABLE setting (
    project TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, content TEXT NOT NULL,
    changed REAL NOT NULL, PRIMARY KEY (project, kind, name)
) WITHOUT ROWID;
"""
SCHEMA = (
    RUN_CONFIG
    + SETTING
    + MEDIA
    + """CREATE TABLE run (
    pk INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, project TEXT NOT NULL,
    name TEXT NOT NULL, group_name TEXT, notes TEXT, tags TEXT NOT NULL DEFAULT '[]', host TEXT,
    status TEXT NOT NULL DEFAULT 'running', created REAL NOT NULL, updated REAL NOT NULL,
    archived INTEGER NOT NULL DEFAULT 0, deleted REAL, color TEXT
);
CREATE INDEX run_by_project ON run (project);
CREATE TABLE session (
    pk INTEGER PRIMARY KEY AUTOINCREMENT, run INTEGER NOT NULL REFERENCES run (pk),
    id TEXT NOT NULL, kind TEXT NOT NULL, rank INTEGER NOT NULL DEFAULT 0, host TEXT, pid INTEGER,
    config TEXT NOT NULL DEFAULT '{}', started REAL NOT NULL, last_seen REAL NOT NULL,
    status TEXT NOT NULL DEFAULT 'running', offset INTEGER NOT NULL DEFAULT 0,
    damaged_lines INTEGER NOT NULL DEFAULT 0, unsent_bytes INTEGER, heard REAL,
    UNIQUE (run, id)
);
CREATE TABLE segment (
    session INTEGER NOT NULL, start INTEGER NOT NULL, size INTEGER NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (session, start)
);
CREATE TABLE metric (
    pk INTEGER PRIMARY KEY AUTOINCREMENT, run INTEGER NOT NULL REFERENCES run (pk),
    name TEXT NOT NULL, count INTEGER NOT NULL DEFAULT 0, last REAL, last_text TEXT,
    last_step INTEGER, min REAL, max REAL, UNIQUE (run, name)
);
CREATE TABLE series (
    pk INTEGER PRIMARY KEY AUTOINCREMENT, metric INTEGER NOT NULL, session INTEGER NOT NULL,
    chunks INTEGER NOT NULL DEFAULT 0, tail INTEGER NOT NULL DEFAULT 0,
    count INTEGER NOT NULL DEFAULT 0, UNIQUE (metric, session)
);
CREATE TABLE chunk (
    pk INTEGER PRIMARY KEY, count INTEGER NOT NULL, min_step INTEGER NOT NULL,
    max_step INTEGER NOT NULL, steps BLOB NOT NULL, numbers BLOB NOT NULL, times BLOB NOT NULL
);
CREATE TABLE peak (
    pk INTEGER PRIMARY KEY, count INTEGER NOT NULL, first_step INTEGER NOT NULL,
    last_step INTEGER NOT NULL, first_time REAL NOT NULL, last_time REAL NOT NULL,
    ordered INTEGER NOT NULL, content BLOB NOT NULL
);
CREATE TABLE text (
    pk INTEGER PRIMARY KEY, run INTEGER NOT NULL, name TEXT NOT NULL, step INTEGER NOT NULL,
    time REAL NOT NULL, text TEXT NOT NULL
);
CREATE INDEX text_by_name ON text (run, name, step);
CREATE TABLE data_table (
    pk INTEGER PRIMARY KEY, run INTEGER NOT NULL, name TEXT NOT NULL, step INTEGER NOT NULL,
    time REAL NOT NULL, content TEXT NOT NULL
);
CREATE INDEX table_by_name ON data_table (run, name, step);
CREATE TABLE checkpoint (
    pk INTEGER PRIMARY KEY, run INTEGER NOT NULL, name TEXT NOT NULL, step INTEGER NOT NULL,
    created REAL NOT NULL, state TEXT NOT NULL, error TEXT, bytes INTEGER NOT NULL,
    aliases TEXT NOT NULL, metadata TEXT NOT NULL, manifest TEXT, removed REAL, reason TEXT,
    UNIQUE (run, name)
);
CREATE TABLE checkpoint_part (
    checkpoint INTEGER NOT NULL, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL,
    PRIMARY KEY (checkpoint, sha256)
) WITHOUT ROWID;
CREATE INDEX checkpoint_by_part ON checkpoint_part (sha256);
CREATE TABLE alert (
    pk INTEGER PRIMARY KEY, run INTEGER, kind TEXT NOT NULL, metric TEXT NOT NULL DEFAULT '',
    message TEXT NOT NULL, opened REAL NOT NULL, resolved REAL, dismissed REAL,
    sent INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX alert_by_run ON alert (run, kind, metric);
CREATE TABLE token (
    pk INTEGER PRIMARY KEY, name TEXT NOT NULL, hash TEXT NOT NULL UNIQUE, scopes TEXT NOT NULL,
    created REAL NOT NULL, last_used REAL, revoked REAL, runs_before INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE token_run (
    token INTEGER NOT NULL, run TEXT NOT NULL, PRIMARY KEY (run, token)
) WITHOUT ROWID;
CREATE TABLE login (
    hash TEXT PRIMARY KEY, token INTEGER NOT NULL, created REAL NOT NULL, expires REAL NOT NULL
);
"""
)

UPGRADES = {
    2: "ALTER TABLE checkpoint ADD COLUMN removed REAL;"
    "ALTER TABLE checkpoint ADD COLUMN reason TEXT;",
    3: "ALTER TABLE token ADD COLUMN runs_before INTEGER NOT NULL DEFAULT 0;"
    "CREATE TABLE token_run (token INTEGER NOT NULL, run TEXT NOT NULL, "
    "PRIMARY KEY (run, token)) WITHOUT ROWID;"
    "ALTER TABLE session ADD COLUMN heard REAL;"
    # Boxes that are at work keep sending: nobody knows which token sent which of these runs.
    "UPDATE token SET runs_before = (SELECT coalesce(max(pk), -1) FROM run);",
    4: f"{RUN_CONFIG}{SETTING}ALTER TABLE run ADD COLUMN color TEXT;",
    5: MEDIA,
}
"""What makes a database of the version before into one of this."""


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Open the database in autocommit mode, for use by one thread at a time.

    Raises:
        EndlexError: it was made by a later version of Endlex.
        sqlite3.Error: it cannot be opened.
    """
    connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    connection.create_collation("PEOPLE", compare_natural)
    if read_only:
        connection.execute("PRAGMA query_only=ON")
        return connection
    try:
        path.chmod(0o600)
    except PermissionError:  # exFAT and the like have no owners
        warn_once(f"{path} cannot be made private: its file system has no permissions")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA journal_size_limit=67108864")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        connection.close()
        raise EndlexError(
            f"{path} has schema {version}, and this version of Endlex knows {SCHEMA_VERSION}: "
            "upgrade endlex"
        )
    if version < SCHEMA_VERSION:
        _bring_up_to_date(connection, version)
    return connection


def compare_natural(left: str, right: str) -> int:
    """Compare texts as people order them: d8 before d12, and a beside A."""
    a, b = (
        [(not part.isdigit(), int(part) if part.isdigit() else 0, part.lower()) for part in parts]
        for parts in (re.findall(r"[0-9]+|[^0-9]+", text) for text in (left, right))
    )
    return (a > b) - (a < b)


def _bring_up_to_date(connection: sqlite3.Connection, version: int) -> None:
    """Make the tables, or change those of an earlier version; all of it or nothing."""
    missing = range(version + 1, SCHEMA_VERSION + 1)
    changes = "".join(UPGRADES[number] for number in missing) if version else SCHEMA
    script = f"BEGIN IMMEDIATE;{changes}PRAGMA user_version={SCHEMA_VERSION};COMMIT;"
    try:
        connection.executescript(script)
        if 0 < version < 4:
            fill_config(connection)
    except sqlite3.OperationalError as error:  # another process was first
        if "already exists" not in str(error) and "duplicate column" not in str(error):
            raise
        connection.execute("ROLLBACK")


class Database:
    """The open database of one server.

    Args:
        path: made if missing; its directory must be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._closed = False
        self._lock = threading.Lock()
        self._writer = connect(path)
        self._thread = threading.Thread(target=self._work, name="endlex-writer", daemon=True)
        self._thread.start()

    def reader(self) -> sqlite3.Connection:
        """Return this thread's own connection, which cannot write."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = connect(self.path, read_only=True)
            with self._lock:
                self._readers.append(connection)
        return connection

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Yield this thread's reader inside one transaction: all it reads is of one moment."""
        connection = self.reader()
        connection.execute("BEGIN")
        try:
            yield connection
        finally:
            connection.execute("COMMIT")

    def write(self, job: Callable[[sqlite3.Connection], T]) -> Future[T]:
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
        open_ = True
        while open_:
            taken = [self._jobs.get()]
            while len(taken) < MOST_JOBS_IN_A_COMMIT and not self._jobs.empty():
                taken.append(self._jobs.get())
            open_ = taken[-1] is not None
            self._commit([job for job in taken if job is not None])

    def _commit(self, jobs: list[Job]) -> None:
        done: list[tuple[Future[Any], Any]] = []
        # Whoever waits may be cancelled, as the sweep is at shutdown, and its job with it. From
        # here on none can be: a result that nobody takes must not end the only writer there is.
        jobs = [job for job in jobs if job[1].set_running_or_notify_cancel()]
        try:
            if jobs:
                self._writer.execute("BEGIN IMMEDIATE")
            for job, future in jobs:
                done.extend(self._run(job, future))
            if jobs:
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

    def _run(
        self, job: Callable[[sqlite3.Connection], Any], future: Future[Any]
    ) -> list[tuple[Future[Any], Any]]:
        self._writer.execute("SAVEPOINT job")
        try:
            result = job(self._writer)
        except Exception as error:
            if not self._writer.in_transaction:  # a full disk undoes everything at once
                raise
            self._writer.execute("ROLLBACK TO job")
            self._writer.execute("RELEASE job")
            future.set_exception(error)
            return []
        self._writer.execute("RELEASE job")
        return [(future, result)]
