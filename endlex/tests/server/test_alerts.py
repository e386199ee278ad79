"""Alerts: opened once, resolved when it is over, delivered though a target is down at first."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from endlex.protocol import EndlexError
from endlex.server.api import journal
from endlex.server.watch import notify
from endlex.server.watch.alerts import is_more_better

RUN = "testrun001"


def kinds(client: Any, *, only_open: bool = True) -> list[tuple[str, str]]:
    found = client.get("/api/v1/alerts", params={"run": RUN, "open": only_open}).json()["alerts"]
    return [(alert["kind"], alert["metric"]) for alert in found]


def sweep(client: Any) -> None:
    server = client.app.state.server
    server.database.write(server.watch.sweep).result(10)


def test_a_nan_is_said_once_until_a_new_session(box: Any, make_box: Any) -> None:
    box.begin()
    box.send([box.metrics(s, {"loss": 1.0}) for s in range(3)])
    assert kinds(box.client) == []
    for step in (3, 4):
        box.send([box.metrics(step, {"loss": "NaN", "grad": 1.0})])
    assert kinds(box.client) == [("nan", "loss")]
    alert = box.client.get("/api/v1/alerts").json()["alerts"][0]
    assert "step 3" in alert["message"]
    assert box.client.get("/api/v1/runs").json()["runs"][0]["alerts"] == 1
    assert box.client.post(f"/api/v1/alerts/{alert['id']}/dismiss").status_code == 200
    box.send([box.metrics(5, {"loss": "Infinity"})])
    assert kinds(box.client) == []
    make_box(box.client, session="000002-resumed").begin()
    box.send([box.metrics(6, {"loss": "NaN"})])
    assert kinds(box.client) == [("nan", "loss")]
    assert len(kinds(box.client, only_open=False)) == 2
    assert box.client.post("/api/v1/alerts/999/dismiss").status_code == 404


def test_divergence_and_recovery(box: Any) -> None:
    box.begin()
    falling = [8 * 0.98**s + 2 for s in range(200)]
    box.send([box.metrics(s, {"train/loss": loss}) for s, loss in enumerate(falling)])
    box.send([box.metrics(200, {"train/loss": 9.0})])  # one spike is no divergence
    assert kinds(box.client) == []
    box.send([box.metrics(201 + s, {"train/loss": 9.0}) for s in range(30)])
    assert kinds(box.client) == [("divergence", "train/loss")]
    box.send([box.metrics(240 + s, {"train/loss": 2.0}) for s in range(60)])
    assert kinds(box.client) == []


def test_three_rises_of_a_validation_metric(box: Any) -> None:
    box.begin()
    names = ("val/bpb", "val/window_loss", "val/accuracy", "other")  # of accuracy, more is better
    for step, value in enumerate([1.0, 0.9, 0.91, 0.92]):
        box.send([box.metrics(step, dict.fromkeys(names, value))])
    assert kinds(box.client) == []
    box.send([box.metrics(9, dict.fromkeys(names, 0.93))])
    assert sorted(kinds(box.client)) == [("rising", "val/bpb"), ("rising", "val/window_loss")]
    box.send([box.metrics(10, dict.fromkeys(names, 0.8))])
    assert kinds(box.client) == []


def test_whether_more_is_better_is_told_by_the_words_of_a_name() -> None:
    """As `isMoreBetter` of the dashboard tells it, which a browser test checks."""
    names = json.loads((Path(__file__).parents[1] / "metric_names.json").read_text())
    more, less = names["more_is_better"], names["less_is_better"]
    assert list(filter(is_more_better, more + less)) == more


def test_silence_is_a_stall_until_something_is_logged(
    box: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.begin()
    sweep(box.client)
    assert kinds(box.client) == []
    now = time.time()
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: now + 11 * 60)
        sweep(box.client)
        sweep(box.client)
    assert kinds(box.client) == [("stall", "")]
    box.send([box.metrics(0, {"loss": 1.0})])
    assert kinds(box.client) == []
    box.send([{"type": "finish", "time": 1.0, "status": "finished"}])
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: now + 22 * 60)
        sweep(box.client)
    assert kinds(box.client) == []


def test_a_crash_and_the_session_that_goes_on(box: Any, make_box: Any) -> None:
    box.begin()
    url = f"/api/v1/runs/{RUN}/sessions/{box.session}/state"
    box.client.post(url, json={"status": "crashed", "reason": "out of memory"})
    box.client.post(url, json={"status": "crashed"})
    assert kinds(box.client) == [("crashed", "")]
    (alert,) = box.client.get("/api/v1/alerts", params={"open": True}).json()["alerts"]
    assert alert["message"] == "the trainer is gone: out of memory"
    make_box(box.client, session="000002-resumed").begin()
    assert kinds(box.client) == []


def test_a_crash_that_is_told_after_the_run_was_resumed_is_no_alert(
    box: Any, make_box: Any
) -> None:
    box.begin()
    make_box(box.client, session="000002-resumed").begin()
    other = make_box(box.client, session="000003-other-rank")
    other.begin(rank=1)
    for crashed, expected in ((box, []), (other, [("crashed", "")])):
        url = f"/api/v1/runs/{box.run}/sessions/{crashed.session}/state"
        assert box.client.post(url, json={"status": "crashed"}).status_code == 200
        assert kinds(box.client) == expected


def test_a_trainer_that_ends_by_an_error_is_an_alert(box: Any, make_box: Any) -> None:
    def finish(status: str, **changes: Any) -> dict[str, Any]:
        return {"type": "finish", "time": time.time(), "status": status, **changes}

    box.send([box.session_record(), finish("failed", reason="ValueError: bad")])
    assert kinds(box.client) == [("failed", "")]
    (alert,) = box.client.get("/api/v1/alerts", params={"open": True}).json()["alerts"]
    assert alert["message"] == "the trainer ended by an error: ValueError: bad"
    again = make_box(box.client, session="000002-resumed")
    again.send([again.session_record(), finish("interrupted")])
    assert kinds(box.client) == []
    assert ("interrupted", "") in kinds(box.client, only_open=False)
    old = make_box(box.client, session="000003-imported")
    old.send([old.session_record(), finish("failed", time=1.6e9)])
    assert kinds(box.client) == []


@pytest.mark.parametrize("sign", ["bytes", "heartbeat"])
def test_a_machine_that_vanishes_is_lost_and_may_return(
    box: Any, monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    box.begin()
    url = f"/api/v1/runs/{RUN}/sessions/{box.session}/state"

    def status() -> tuple[str, str]:
        run = box.client.get(f"/api/v1/runs/{RUN}").json()
        return run["status"], run["sessions"][0]["status"]

    now = time.time()
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: now + 14 * 60)
        assert box.client.post(url, json={"status": "running"}).status_code == 200
        later.setattr(time, "time", lambda: now + 28 * 60)
        sweep(box.client)
        assert status() == ("running", "running")  # though nothing was logged for long
        later.setattr(time, "time", lambda: now + 30 * 60)
        sweep(box.client)
    assert status() == ("lost", "lost")
    assert kinds(box.client) == [("lost", "")]
    listed = box.client.get("/api/v1/runs", params={"q": "status:lost"}).json()
    assert listed["total"] == 1
    if sign == "bytes":
        box.send([box.metrics(0, {"loss": 1.0})])
    else:
        box.client.post(url, json={"status": "running"})
    assert status() == ("running", "running")
    assert kinds(box.client) == []


def test_disks_that_fill_up(start: Callable[..., Any], make_box: Any) -> None:
    client = start(min_free_bytes=2**60)
    sweep(client)
    found = client.get("/api/v1/alerts?open=true").json()["alerts"]
    assert [(alert["run"], alert["kind"]) for alert in found] == [(None, "disk")]
    client.__exit__(None, None, None)
    box = make_box(start())
    box.begin(kind="system")
    for percent, expected in ((90.0, 0), (96.0, 1), (97.0, 1), (50.0, 0)):
        box.send([box.metrics(0, {"system/disk_percent": percent})])
        assert len(kinds(box.client)) == expected


class Receiver:
    """A webhook that refuses the first request."""

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes]] = []
        self.asked = 0
        self.refusal = b"HTTP/1.1 503 Later\r\nContent-Length: 0\r\n\r\n"
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.asked += 1
                if receiver.asked == 1:
                    self.wfile.write(receiver.refusal)
                    return
                receiver.got.append((self.path, body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    running = Receiver()
    yield running
    running.server.shutdown()
    running.server.server_close()


def test_a_projects_rule_must_hold_for_as_long_as_it_says(box: Any) -> None:
    box.begin()
    where = {"kind": "rules", "name": "val/* > 2"}
    box.client.put("/api/v1/settings", params=where, json={"minutes": 10}).raise_for_status()
    where = {"kind": "rules", "name": "loss<1", "project": "another"}
    box.client.put("/api/v1/settings", params=where, json={}).raise_for_status()

    def log(minute: float, value: float) -> list[tuple[str, str]]:
        box.send([{**box.metrics(int(minute), {"val/bpb": value}), "time": minute * 60}])
        return kinds(box.client)

    assert log(0, 3.0) == log(9, 3.0) == log(10, 1.0) == log(11, 3.0) == log(20, 3.0) == []
    assert log(21, 3.0) == [("rule", "val/bpb: val/* > 2")]
    (alert,) = box.client.get("/api/v1/alerts", params={"open": True}).json()["alerts"]
    assert alert["message"] == "val/bpb is 3 at step 21: val/* > 2 for 10 minutes"
    assert log(22, 1.0) == []


def test_what_the_trainer_says_stays_until_it_says_it_again_or_begins_anew(
    box: Any, make_box: Any
) -> None:
    box.begin()

    def alert(text: str, level: str = "warning") -> dict[str, Any]:
        content = {"title": "odd", "text": text, "level": level}
        return {"type": "alert", "time": time.time(), **content}

    box.send([alert("one"), alert("two"), alert("bad", "loud")])
    found = box.client.get("/api/v1/alerts", params={"open": True}).json()["alerts"]
    assert [(a["kind"], a["metric"], a["message"]) for a in found] == [
        ("warning", "odd", "odd: two")
    ]
    make_box(box.client, session="000002-resumed").begin()
    assert kinds(box.client) == []


def test_alerts_reach_a_webhook_and_a_topic(
    start: Callable[..., Any],
    make_box: Any,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notify, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(notify, "FIRST_PAUSE", 0.05)
    client = start(alerts=(f"{receiver.url}/hook", f"ntfy+{receiver.url}/topic"))
    box = make_box(client)
    box.begin()
    box.send([box.metrics(7, {"loss": "NaN"})])
    deadline = time.monotonic() + 10
    while len(receiver.got) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    got = dict(receiver.got)
    assert set(got) == {"/hook", "/topic"}
    hook = json.loads(got["/hook"])
    assert (hook["run"], hook["kind"], hook["metric"]) == (RUN, "nan", "loss")
    assert b"loss is nan at step 7" in got["/topic"]
    time.sleep(0.1)
    assert len(receiver.got) == 2, "each was delivered once"


def test_points_whose_commit_failed_count_once(box: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    box.begin()
    low = [box.metrics(step, {"loss": 1.0}) for step in range(15)]
    with monkeypatch.context() as full:

        def fail(*_: Any) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        full.setattr(journal.sessions, "update_run", fail)
        assert box.post(box.lines(low), len(box.sent)).status_code == 507
    box.send(low)
    box.send([box.metrics(15 + step, {"loss": 9.0}) for step in range(10)])
    assert kinds(box.client) == [], "20 points come before a divergence is told"


def test_delivery_survives_a_deleted_run_and_an_answer_that_is_not_http(
    start: Callable[..., Any],
    make_box: Any,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notify, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(notify, "FIRST_PAUSE", 0.05)
    receiver.refusal = b"nonsense"
    client = start(alerts=(f"{receiver.url}/hook",))
    database, read = client.app.state.server.database, notify.dicts

    def read_before_deletion(*arguments: Any) -> list[dict[str, Any]]:
        found = read(*arguments)
        database.write(lambda c: c.execute("DELETE FROM run").rowcount).result(10)
        return found

    monkeypatch.setattr(notify, "dicts", read_before_deletion)
    end = {"type": "finish", "time": time.time(), "status": "failed", "reason": "ValueError"}
    for number, run in enumerate(("deleted001", "deleted002"), 1):
        box = make_box(client, run)
        box.send([box.session_record(), end])
        deadline = time.monotonic() + 10
        while len(receiver.got) < number and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(receiver.got) == number
    assert receiver.asked == 3


def test_a_crash_reaches_slack_discord_and_mail_with_its_last_lines(
    start: Callable[..., Any],
    make_box: Any,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mails: list[Any] = []

    class Smtp:
        def __init__(self, host: str, port: int, timeout: float) -> None:
            self.said: list[Any] = [host, port]

        def __enter__(self) -> Smtp:
            return self

        def __exit__(self, *_: object) -> None:
            mails.append(self.said)

        def __getattr__(self, name: str) -> Any:
            return lambda *words: self.said.append((name, *map(str, words)))

    monkeypatch.setattr(notify.smtplib, "SMTP", Smtp)
    monkeypatch.setattr(notify, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(notify, "FIRST_PAUSE", 0.05)
    kinds = ("slack", "discord")
    targets = [f"{kind}+{receiver.url}/{kind}" for kind in kinds]
    client = start(alerts=(*targets, "smtp://me%40b:pw@mail.example.org:25/?to=you@example.org"))
    box = make_box(client)
    box.begin()
    text = {"type": "text", "step": 1, "time": 1.0}
    box.send(
        [
            {**text, "name": "run/console", "text": "step 1\nstep 2"},
            {**text, "name": "run/exception", "text": "Traceback\nValueError: `bad`"},
            {"type": "finish", "time": time.time(), "status": "failed", "reason": "ValueError"},
        ]
    )
    deadline = time.monotonic() + 10
    while (len(receiver.got) < 2 or not mails) and time.monotonic() < deadline:
        time.sleep(0.01)
    got = {path: json.loads(body) for path, body in receiver.got}
    for said in (got["/slack"]["text"], got["/discord"]["content"]):
        assert "failed*" in said
        assert "```\nTraceback\nValueError: 'bad'\n```\n```\nstep 1\nstep 2\n```" in said
    host, port, tls, login, (_, mail) = mails[0]
    assert (host, port, tls) == ("mail.example.org", 25, ("starttls",))
    assert login == ("login", "me@b", "pw")
    assert "Subject: Endlex: " in mail
    assert "step 2" in mail
    with pytest.raises(EndlexError, match="alerts cannot go to ftp://x"):
        notify.check_target("ftp://x/secret")
    with pytest.raises(EndlexError, match="an address without a host: give https://"):
        notify.check_target("ntfy+ntfy.example.org/secret")
