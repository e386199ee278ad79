"""Deliver alerts to people, in a thread of its own so that nothing else waits for it.

The scheme of a target's address, or its host, says how it is told:

    https://...                            JSON (json+https:// whatever the host)
    https://hooks.slack.com/...            Slack's form; slack+https:// for others that take it
    https://discord.com/api/webhooks/...   Discord's; discord+https:// for others
    ntfy+https://...                       an ntfy topic
    smtps://USER:PASSWORD@HOST/?to=ADDRESS e-mail (smtp:// with STARTTLS where there is a password)

A failed delivery is retried with growing pauses for about half an hour, and after a restart, so an
alert may arrive twice but is not lost to a short outage. Alerts that are older than an hour when
the server starts are not sent. Addresses may hold secrets, so logs name only the host.
"""

from __future__ import annotations

import json
import logging
import smtplib
import sqlite3
import threading
import time
import urllib.request
from dataclasses import dataclass
from email.message import EmailMessage
from http.client import HTTPException
from sqlite3 import Connection
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from endlex.protocol import CONSOLE, EXCEPTION, EndlexError
from endlex.server.settings import Settings
from endlex.server.store.database import Database, dicts, update

logger = logging.getLogger("endlex")

LOOK_SECONDS = 2.0
TIMEOUT_SECONDS = 10.0
FIRST_PAUSE = 5.0
ATTEMPTS = 9
NEWS_SECONDS = 3600.0
WITH_DETAILS = ("failed", "crashed", "interrupted", "lost", "stall")
DETAIL_CHARS = 1500
LOG_LINES = 20
HOSTS = {"hooks.slack.com": "slack", "discord.com": "discord", "discordapp.com": "discord"}
UNDELIVERED = (OSError, EndlexError, ValueError, HTTPException, smtplib.SMTPException)


@dataclass
class _Pending:
    """An alert to deliver; `left` are the targets that have not received it."""

    left: set[str]
    attempts: int = 0
    due: float = 0.0


class Notifier:
    """Delivers the alerts that `alerts` opens; does nothing if no target is set."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._targets = set(settings.alerts)
        self._pending: dict[int, _Pending] = {}
        self._stopping = threading.Event()
        self._since = time.time() - NEWS_SECONDS
        self._thread = threading.Thread(target=self._work, name="endlex-notify", daemon=True)
        if self._targets:
            self._thread.start()

    def stop(self) -> None:
        """End the thread; alerts that were not delivered are sent after the next start."""
        self._stopping.set()
        if self._targets:
            self._thread.join(TIMEOUT_SECONDS)

    def _work(self) -> None:
        while not self._stopping.wait(LOOK_SECONDS):
            try:
                self._deliver_all()
            except (sqlite3.Error, OSError, EndlexError) as error:
                logger.warning("cannot look for alerts to deliver: %s", error)

    def _deliver_all(self) -> None:
        reader = self._database.reader()
        alerts = dicts(
            reader,
            "SELECT alert.pk AS id, alert.run AS pk, run.id AS run, project, run.name AS name, "
            "kind, metric, message, opened FROM alert LEFT JOIN run ON run.pk = alert.run "
            "WHERE sent=0 AND dismissed IS NULL AND opened > ? ORDER BY alert.pk",
            (self._since,),
        )
        for alert in alerts:
            run = alert.pop("pk")
            pending = self._pending.setdefault(alert["id"], _Pending(set(self._targets)))
            if self._stopping.is_set() or time.monotonic() < pending.due:
                continue
            if run is not None and alert["kind"] in WITH_DETAILS:
                alert |= read_details(reader, run)
            self._deliver(alert, pending)

    def _deliver(self, alert: dict[str, Any], pending: _Pending) -> None:
        for target in sorted(pending.left):
            try:
                send(target, alert)
                pending.left.discard(target)
            except UNDELIVERED as error:
                # An error of the opener may name the whole address.
                reason = getattr(error, "reason", None) or type(error).__name__
                host = urlsplit(target).hostname
                logger.warning("alert %s not delivered to %s: %s", alert["id"], host, reason)
        pending.due = time.monotonic() + FIRST_PAUSE * 2**pending.attempts
        pending.attempts += 1
        if not pending.left or pending.attempts >= ATTEMPTS:
            self._database.write(lambda db: update(db, "alert", alert["id"], sent=1)).result()
            del self._pending[alert["id"]]


def read_details(db: Connection, run: int) -> dict[str, str]:
    """Return the exception that ended a run, and the last lines it printed, as far as known."""
    found = {}
    query = "SELECT text FROM text WHERE run=? AND name=? ORDER BY step DESC, pk DESC LIMIT ?"
    for key, name, pieces in (("exception", EXCEPTION, 1), ("log", CONSOLE, 2)):
        rows = [text for (text,) in db.execute(query, (run, name, pieces))]
        if lines := "\n".join(reversed(rows)).splitlines()[-LOG_LINES:]:
            found[key] = "\n".join(lines)[-DETAIL_CHARS:]
    return found


def check_target(target: str) -> tuple[str, str]:
    """Return how to tell an address, and it without a prefix that says so, or an `EndlexError`."""
    kind, plus, address = target.partition("+")
    if not plus or "/" in kind:
        kind, address = HOSTS.get(urlsplit(target).hostname or "", "json"), target
    parts = urlsplit(address)
    if parts.scheme in ("smtp", "smtps") and parts.hostname and parse_qs(parts.query).get("to"):
        return "mail", address
    if kind in ("json", "slack", "discord", "ntfy") and parts.scheme in ("http", "https"):
        return kind, address
    where = f"{parts.scheme}://{parts.hostname}" if parts.hostname else "an address without a host"
    raise EndlexError(
        f"alerts cannot go to {where}: give https://..., "
        "slack+https://..., discord+https://..., ntfy+https://... or smtps://...?to=ADDRESS"
    )


def send(target: str, alert: dict[str, Any]) -> None:
    """Tell one target of an alert; one of `UNDELIVERED` if it did not take it."""
    kind, address = check_target(target)
    where = f"{alert['project']}/{alert['name']}" if alert["run"] else "server"
    title, message = f"Endlex: {where}: {alert['kind']}", alert["message"]
    details = [alert[key].replace("`", "'") for key in ("exception", "log") if key in alert]
    if kind == "mail":
        _send_mail(address, title, "\n\n".join([message, *details]))
        return
    quoted = "".join(f"\n```\n{detail}\n```" for detail in details)
    headers = {"Content-Type": "application/json"}
    if kind == "ntfy":
        headers = {"Title": f"Endlex: {alert['kind']}", "Tags": "warning"}
        body = "\n\n".join([f"{where}: {message}", *details])
    elif kind == "slack":
        body = json.dumps({"text": f"*{title}*\n{message}{quoted}"})
    elif kind == "discord":
        text = f"**{title}**\n{message}{quoted}"
        body = json.dumps({"content": text if len(text) <= 2000 else f"{text[:1990]}\n```"})
    else:
        body = json.dumps({"source": "endlex", **alert})
    request = urllib.request.Request(address, body.encode(), headers, method="POST")
    urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close()


def _send_mail(address: str, title: str, text: str) -> None:
    parts = urlsplit(address)
    query, user = parse_qs(parts.query), unquote(parts.username or "")
    message = EmailMessage()
    message["Subject"] = " ".join(title.split())
    message["To"] = ", ".join(query["to"])
    message["From"] = query.get("from", [user or query["to"][0]])[0]
    message.set_content(text)
    kind = smtplib.SMTP_SSL if parts.scheme == "smtps" else smtplib.SMTP
    assert parts.hostname is not None
    with kind(parts.hostname, parts.port or 0, timeout=TIMEOUT_SECONDS) as server:
        if user:
            if parts.scheme == "smtp":
                server.starttls()
            server.login(user, unquote(parts.password or ""))
        server.send_message(message)
