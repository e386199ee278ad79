"""The writer: jobs that share a commit do not share their failures, and a full disk undoes all."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from endlex.protocol import EndlexError
from endlex.server.api import journal
from endlex.server.store.database import Database, connect

RUN = "testrun001"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "x.sqlite3")
    yield opened
    opened.close()


def add(name: str) -> Callable[[sqlite3.Connection], None]:
    def job(connection: sqlite3.Connection) -> None:
        connection.execute(
            "INSERT INTO token (name, hash, scopes, created) VALUES (?, ?, '', 0)", (name, name)
        )

    return job


def names(database: Database) -> list[str]:
    return [name for (name,) in database.reader().execute("SELECT name FROM token ORDER BY pk")]


def test_a_failing_job_is_undone_alone(database: Database) -> None:
    go = threading.Event()

    def hold(connection: sqlite3.Connection) -> None:
        go.wait(10)

    def fail(connection: sqlite3.Connection) -> None:
        add("undone")(connection)
        raise ValueError("on purpose")

    waiting = database.write(hold)  # so that the others wait together and share a commit
    first, failing, last = map(database.write, (add("first"), fail, add("last")))
    go.set()
    for future in (waiting, first, last):
        future.result(10)
    with pytest.raises(ValueError, match="on purpose"):
        failing.result(10)
    assert names(database) == ["first", "last"]


def test_a_job_that_was_cancelled_stops_neither_the_writer_nor_its_neighbours(
    database: Database,
) -> None:
    entered, go = threading.Event(), threading.Event()

    def hold(connection: sqlite3.Connection) -> None:
        entered.set()
        go.wait(10)

    waiting = database.write(hold)
    assert entered.wait(10)
    assert not waiting.cancel()  # it runs: too late
    cut_off, kept = database.write(add("cut off")), database.write(add("kept"))
    assert cut_off.cancel()
    go.set()
    waiting.result(10)
    kept.result(10)
    database.write(add("later")).result(10)  # the writer lives on
    assert names(database) == ["kept", "later"]


def test_jobs_that_wait_at_the_end_are_done(tmp_path: Path) -> None:
    database = Database(tmp_path / "x.sqlite3")
    futures = [database.write(add(str(i))) for i in range(100)]
    database.close()
    assert all(future.done() for future in futures)
    with pytest.raises(EndlexError, match="shutting down"):
        database.write(add("late"))
    count = "SELECT count(*) FROM token"
    found = Database(tmp_path / "x.sqlite3").ask(lambda c: c.execute(count).fetchone()[0])
    assert found == 100


def test_readers_cannot_write(database: Database) -> None:
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        database.reader().execute("DELETE FROM token")


def test_a_later_version_s_database_is_refused(tmp_path: Path) -> None:
    connection = connect(tmp_path / "x.sqlite3")
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(EndlexError, match="upgrade"):
        Database(tmp_path / "x.sqlite3")


def test_an_earlier_version_s_database_is_brought_up_to_date(tmp_path: Path) -> None:
    connection = connect(tmp_path / "x.sqlite3")
    new = connection.execute("SELECT sql FROM sqlite_master WHERE name='checkpoint'").fetchone()[0]
    for column in ("removed", "reason"):
        connection.execute(f"ALTER TABLE checkpoint DROP COLUMN {column}")
    connection.execute("DROP TABLE token_run")
    connection.execute("ALTER TABLE token DROP COLUMN runs_before")
    connection.execute("ALTER TABLE session DROP COLUMN heard")
    connection.execute("DROP TABLE run_config")
    for table in ("setting", "media", "media_part"):
        connection.execute(f"DROP TABLE {table}")
    connection.execute("ALTER TABLE run DROP COLUMN color")
    connection.execute("INSERT INTO run (id, project, name, created, updated) VALUES (1,1,1,1,1)")
    connection.execute(
        "INSERT INTO session (run, id, kind, config, started, last_seen) "
        """VALUES (1, 's', 'trainer', '{"optim": {"lr": 0.5}}', 1, 1)"""
    )
    connection.execute("PRAGMA user_version=1")
    connection.execute("INSERT INTO token (name, hash, scopes, created) VALUES ('a','h','read',1)")
    connection.close()
    for _ in range(2):
        connection = connect(tmp_path / "x.sqlite3")
        columns = [row[1] for row in connection.execute("PRAGMA table_info(checkpoint)")]
        assert columns[-2:] == ["removed", "reason"]
        assert connection.execute("SELECT count(*) FROM token").fetchone()[0] == 1
        config = connection.execute("SELECT * FROM run_config").fetchall()
        assert config == [(1, "optim.lr", 0.5, "0.5")]
        connection.close()
    assert "removed REAL, reason TEXT" in new


def test_a_database_without_room_answers_507_and_takes_it_later(box: Any) -> None:
    box.begin()
    database = box.client.app.state.server.database

    def limit(pages: int) -> None:
        def job(connection: sqlite3.Connection) -> int:
            used: int = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count={used + pages}")
            return used

        database.write(job).result(10)

    limit(2)
    records = [box.metrics(s, {"loss": 1.0, "bad": s}) for s in range(5000)]
    body = box.lines(records)
    answer = box.post(body, len(box.sent))
    assert (answer.status_code, "error" in answer.json()) == (507, True)
    assert box.client.get(box.url).json()["offset"] == len(box.sent)
    assert box.client.get(f"/api/v1/runs/{RUN}").json()["metrics"] == []
    limit(10_000)
    box.send(records)
    assert box.client.get(f"/api/v1/runs/{RUN}").json()["metrics"][0]["count"] == 5000


def test_an_alert_whose_transaction_was_undone_is_opened_again(
    box: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.begin()
    records = [box.metrics(0, {"loss": "NaN"})]

    def full(connection: sqlite3.Connection, run: int) -> str:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(journal.sessions, "update_run", full)
        assert box.post(box.lines(records), len(box.sent)).status_code == 507
    assert box.client.get("/api/v1/alerts").json()["alerts"] == []
    box.send(records)
    assert len(box.client.get("/api/v1/alerts").json()["alerts"]) == 1
