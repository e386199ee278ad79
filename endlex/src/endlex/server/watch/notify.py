"""Alerts to a webhook and to an ntfy topic, by a thread of its own: nothing else ever waits for it.

What was not delivered is tried again with growing pauses for about half an hour, and after a
restart, so an alert may arrive twice but is not lost to a short outage. An alert that is older than
an hour when the server starts is no news. Addresses may hold secrets, so logs name the host alone.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from endlex.protocol import EndlexError
from endlex.server.settings import Settings
from endlex.server.store.database import Database

logger = logging.getLogger("endlex")

LOOK_SECONDS = 2.0
TIMEOUT_SECONDS = 10.0
FIRST_PAUSE = 5.0
ATTEMPTS = 9
NEWS_SECONDS = 3600.0
DELIVERED, GIVEN_UP = 1, 2


@dataclass
class _Pending:
    """An alert on its way; `left` are the targets that do not have it."""

    left: set[str]
    attempts: int = 0
    due: float = 0.0


class Notifier:
    """Delivers what `alerts` opens; does nothing where no target is set."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._targets = {"webhook": settings.alert_webhook, "ntfy": settings.ntfy}
        self._pending: dict[int, _Pending] = {}
        self._stopping = threading.Event()
        self._since = time.time() - NEWS_SECONDS
        self._thread = threading.Thread(target=self._work, name="endlex-notify", daemon=True)

    def start(self) -> None:
        """Begin, if there is anybody to tell."""
        if any(self._targets.values()):
            self._thread.start()

    def stop(self) -> None:
        """End the thread; what was not delivered is at the next start."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(TIMEOUT_SECONDS)

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                self._deliver_all()
            except (sqlite3.Error, OSError, EndlexError) as error:
                logger.warning("cannot look for alerts to deliver: %s", error)
            self._stopping.wait(LOOK_SECONDS)

    def _deliver_all(self) -> None:
        rows = self._database.reader().execute(
            "SELECT alert.pk, run.id, run.project, run.name, kind, metric, message, opened "
            "FROM alert LEFT JOIN run ON run.pk = alert.run "
            "WHERE sent=0 AND dismissed IS NULL AND opened > ? ORDER BY alert.pk",
            (self._since,),
        )
        names = ("id", "run", "project", "name", "kind", "metric", "message", "opened")
        for row in rows.fetchall():
            if self._stopping.is_set():
                return
            alert = dict(zip(names, row, strict=True))
            left = {name for name, url in self._targets.items() if url}
            pending = self._pending.setdefault(alert["id"], _Pending(left))
            if time.monotonic() >= pending.due:
                self._deliver(alert, pending)

    def _deliver(self, alert: dict[str, Any], pending: _Pending) -> None:
        for target in sorted(pending.left):
            url = self._targets[target]
            assert url is not None
            try:
                with urllib.request.urlopen(_request(target, url, alert), timeout=TIMEOUT_SECONDS):
                    pending.left.discard(target)
            except (OSError, ValueError) as error:
                # An error of the opener may name the whole address.
                reason = getattr(error, "reason", None) or type(error).__name__
                host = urlsplit(url).hostname
                logger.warning("alert %s not delivered to %s: %s", alert["id"], host, reason)
        pending.attempts += 1
        pending.due = time.monotonic() + FIRST_PAUSE * 2 ** (pending.attempts - 1)
        if pending.left and pending.attempts < ATTEMPTS:
            return
        outcome = GIVEN_UP if pending.left else DELIVERED
        job_values = (outcome, alert["id"])
        self._database.write(
            lambda c: c.execute("UPDATE alert SET sent=? WHERE pk=?", job_values).rowcount
        ).result()
        self._pending.pop(alert["id"], None)


def _request(target: str, url: str, alert: dict[str, Any]) -> urllib.request.Request:
    if target == "webhook":
        body = json.dumps({"source": "endlex", **alert}).encode()
        headers = {"Content-Type": "application/json"}
    else:
        where = f"{alert['project']}/{alert['name']}: " if alert["run"] else ""
        body = f"{where}{alert['message']}".encode()
        headers = {"Title": f"Endlex: {alert['kind']}", "Tags": "warning"}
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError("the address is not http or https")
    return urllib.request.Request(url, body, headers, method="POST")
