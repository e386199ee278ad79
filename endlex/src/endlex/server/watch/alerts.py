"""Alerts: what is worth waking somebody for, found while data comes in and by a timer.

The rules, each for one run (and metric):

- `nan`: a metric of the trainer is NaN or infinite. It stays until it is dismissed or until a new
  session begins.
- `divergence`: of a metric named `loss` or `.../loss`, the exponential mean (factor 0.9, after 20
  points) is more than twice its lowest so far and at least 0.5 above it. It resolves itself when
  the mean is below again. The mean is kept in memory: a restarted server begins it anew.
- `rising`: a `val/...` metric of which less is better has risen three evaluations in a row. Names
  that speak of accuracy, score, reward or the like are left out. It resolves itself when the
  metric falls.
- `stall`: a running run's trainer has logged nothing for longer than the limit; resolved by data.
- `failed`: a trainer ended by an error; `crashed`: the shipper says that it is gone without a word;
  both with the reason, and resolved by a new session. `interrupted` and `finished` are told, and
  over at once.
- `lost`: nothing was heard from a running session's machine for a quarter of an hour, not even the
  shipper's heartbeat. The session's status is `lost` until something is heard, which resolves it.
- `disk`: a disk nearly full, on the training box or the server's own (an alert without a run).
- `rule`: what people set for their projects (`rules`).
- `info`, `warning`, `error`: what the trainer says itself (`run.alert`); until a new session.

For each (run, kind, metric) there is one alert at a time: while it is unresolved, dismissed or not,
the same thing is not said again.
"""

from __future__ import annotations

import math
import re
import shutil
import sqlite3
import time
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from endlex.protocol import LEVELS, LOST, SYSTEM, TRAINER
from endlex.server.settings import DataDir, Settings
from endlex.server.store.records import Batch, Points
from endlex.server.store.sessions import SessionState, update_run, was_resumed
from endlex.server.watch.rules import RuleWatch

Event = tuple[str, dict[str, Any]]
Key = tuple[int | None, str, str]

SMOOTHING = 0.9
WARM_UP = 20
DIVERGED_RATIO = 2.0
DIVERGED_RISE = 0.5
RISES = 3
MORE_IS_BETTER = re.compile(r"acc|score|reward|core|f1|bleu|rouge|exact|pass|win|recall|precision")
DISK_PERCENT = re.compile(r"disk.*(percent|used_pct|_pct|%)")
DISK_FULL_PERCENT = 95.0
DISK_FINE_PERCENT = 92.0
DISK_FREE = re.compile(r"(?:disk|home).*free.*(bytes|gib|gb)")
DISK_FREE_BYTES = 2 * 2**30
ENDS = {
    "failed": "the trainer ended by an error",
    "crashed": "the trainer is gone",
    "interrupted": "the trainer was interrupted",
    "finished": "the trainer has finished",
}
"""Each end of a session, and what is said of it."""
LOST_SECONDS = 900.0
"""Without a heartbeat, which comes every 20 seconds, before a session counts as lost."""
LOSSES_WATCHED = 10_000
QUIET_AFTER = 7 * 86400.0
"""Seconds after which a run that fell silent is history, not news."""


@dataclass
class _Loss:
    mean: float = 0.0
    lowest: float = math.inf
    count: int = 0

    def add(self, numbers: list[float]) -> bool:
        """Take points in; return whether the loss has diverged at the last of them."""
        for number in numbers:
            if not math.isfinite(number):
                continue
            self.count += 1
            factor = min(SMOOTHING, 1 - 1 / self.count)
            self.mean = factor * self.mean + (1 - factor) * number
            if self.count >= WARM_UP and self.mean < self.lowest:
                self.lowest = self.mean
        rise = self.mean - self.lowest
        return self.lowest > 0 and rise > max((DIVERGED_RATIO - 1) * self.lowest, DIVERGED_RISE)


class Watch:
    """Judges what comes in. All but the constructor runs in the database's writer thread."""

    def __init__(self, settings: Settings, data: DataDir) -> None:
        self._data = data
        self._stall_seconds = settings.stall_minutes * 60
        self._reserve = settings.reserve(data.root)
        self._losses: OrderedDict[tuple[int, str], _Loss] = OrderedDict()
        self._evaluations: OrderedDict[tuple[int, str], list[float]] = OrderedDict()
        self._rules = RuleWatch()
        self._unresolved: set[Key] | None = None
        self._started = time.time()

    def forget(self) -> None:
        """Read from the database anew what is unresolved, after a transaction was undone."""
        self._unresolved = None

    def observe(
        self, connection: sqlite3.Connection, state: SessionState, run_id: str, batch: Batch
    ) -> list[Event]:
        """Open and resolve alerts for one batch of a session; return what readers should hear."""
        book = _Book(connection, self._known(connection), state.run, run_id)
        self._rules.observe(connection, state.run, batch, book.break_rule, book.keep_rule)
        if state.kind == SYSTEM:
            for name, points in batch.points.items():
                self._watch_disk(book, name, points)
            return book.events
        book.resolve("stall")
        book.resolve("lost")
        if batch.sessions:
            for kind in (*ENDS, *LEVELS, "nan"):
                book.resolve_all(kind)
        for name, points in batch.points.items():
            if len(points.steps):
                self._watch_metric(book, state.run, name, points)
        for record in batch.alerts:
            if time.time() - record["time"] < QUIET_AFTER:
                book.resolve(record["level"], record["title"])  # the latest one is told
                said = ": ".join(filter(None, (record["title"], record["text"])))
                book.open(record["level"], record["title"], said)
        if batch.status and time.time() - (batch.ended or 0) < QUIET_AFTER:
            book.events += self.ended(connection, state, run_id, batch.status, batch.reason)
        return book.events

    def ended(
        self,
        connection: sqlite3.Connection,
        state: SessionState,
        run_id: str,
        status: str,
        reason: str | None,
    ) -> list[Event]:
        """Say that a trainer is gone, and why, unless a later one has its place by now."""
        book = _Book(connection, self._known(connection), state.run, run_id)
        if state.kind == TRAINER and not was_resumed(connection, state):
            book.open(status, "", ": ".join(filter(None, (ENDS[status], reason))))
            if status in ("finished", "interrupted"):
                book.resolve(status)
        return book.events

    def returned(self, connection: sqlite3.Connection, run: int, run_id: str) -> list[Event]:
        """Resolve the alert of a machine that is heard of again."""
        book = _Book(connection, self._known(connection), run, run_id)
        book.resolve("lost")
        return book.events

    def sweep(self, connection: sqlite3.Connection) -> list[Event]:
        """Look for what shows in no data: silence, and the server's own disk."""
        now = time.time()
        events = self._own_disk(connection) + self._lost(connection, now)
        rows = connection.execute(
            "SELECT run.pk, run.id, max(session.last_seen) FROM run JOIN session "
            "ON session.run = run.pk WHERE run.status='running' AND run.archived=0 "
            "AND run.deleted IS NULL AND session.kind=? GROUP BY run.pk",
            (TRAINER,),
        ).fetchall()
        for run, run_id, seen in rows:
            silent = now - max(seen, self._started)
            if now - seen < QUIET_AFTER and silent > self._stall_seconds:
                book = _Book(connection, self._known(connection), run, run_id)
                book.open("stall", "", f"nothing was logged for {silent / 60:.0f} minutes")
                events += book.events
        return events

    def _lost(self, connection: sqlite3.Connection, now: float) -> list[Event]:
        """Give up running sessions of which nothing was heard; the server itself was there."""
        events: list[Event] = []
        rows = connection.execute(
            "SELECT session.pk, run.pk, run.id, session.kind, coalesce(heard, last_seen), updated "
            "FROM session JOIN run ON run.pk = session.run WHERE session.status='running' "
            "AND coalesce(heard, last_seen) < ?",
            (now - LOST_SECONDS,),
        ).fetchall()
        for session, run, run_id, kind, heard, updated in rows:
            if now - self._started < LOST_SECONDS:
                break
            connection.execute("UPDATE session SET status=? WHERE pk=?", (LOST, session))
            status = update_run(connection, run, updated)
            events.append(("run", {"run": run_id, "updated": updated, "status": status}))
            if kind == TRAINER and now - heard < QUIET_AFTER:
                book = _Book(connection, self._known(connection), run, run_id)
                book.resolve("stall")
                silent = f"{(now - heard) / 60:.0f} minutes"
                book.open("lost", "", f"nothing was heard of the training box for {silent}")
                events += book.events
        return events

    def _known(self, connection: sqlite3.Connection) -> set[Key]:
        if self._unresolved is None:
            rows = connection.execute("SELECT run, kind, metric FROM alert WHERE resolved IS NULL")
            self._unresolved = set(rows.fetchall())
        return self._unresolved

    def _watch_metric(self, book: _Book, run: int, name: str, points: Points) -> None:
        finite = np.isfinite(points.numbers)
        if not finite.all():
            at = int(np.argmin(finite))
            step, number = int(points.steps[at]), points.numbers[at]
            book.open("nan", name, f"{name} is {number} at step {step}")
        if name == "loss" or name.endswith("/loss"):
            self._watch_loss(book, run, name, points)
        if name.startswith("val/") and not MORE_IS_BETTER.search(name.lower()):
            self._watch_evaluations(book, run, name, points)

    def _watch_loss(self, book: _Book, run: int, name: str, points: Points) -> None:
        loss = _kept(self._losses, (run, name), _Loss)
        if loss.add(points.numbers.tolist()):
            step = int(points.steps[-1])
            message = f"{name} is {loss.mean:.4g} (smoothed) at step {step}; its lowest was"
            book.open("divergence", name, f"{message} {loss.lowest:.4g}")
        else:
            book.resolve("divergence", name)

    def _watch_evaluations(self, book: _Book, run: int, name: str, points: Points) -> None:
        last = _kept(self._evaluations, (run, name), list)
        last += [n for n in points.numbers.tolist() if math.isfinite(n)]
        del last[: -(RISES + 1)]
        rises = [later > earlier for earlier, later in pairwise(last)]
        if len(rises) == RISES and all(rises):
            shown = ", ".join(f"{n:.5g}" for n in last)
            book.open("rising", name, f"{name} has risen {RISES} evaluations in a row: {shown}")
        elif rises and not rises[-1]:
            book.resolve("rising", name)

    def _watch_disk(self, book: _Book, name: str, points: Points) -> None:
        last = float(points.numbers[-1])
        lower = name.lower()
        if DISK_PERCENT.search(lower):
            if last >= DISK_FULL_PERCENT:
                book.open("disk", name, f"a disk of the training box is {last:.0f} % full")
            elif last < DISK_FINE_PERCENT:
                book.resolve("disk", name)
        elif match := DISK_FREE.search(lower):
            free = last * {"bytes": 1, "gib": 2**30, "gb": 1e9}[match.group(1)]
            if free < DISK_FREE_BYTES:
                book.open(
                    "disk", name, f"a disk of the training box has {free / 2**30:.2f} GiB left"
                )
            elif free > 1.5 * DISK_FREE_BYTES:
                book.resolve("disk", name)

    def _own_disk(self, connection: sqlite3.Connection) -> list[Event]:
        free = shutil.disk_usage(self._data.root).free
        book = _Book(connection, self._known(connection), None, None)
        if free < 2 * self._reserve:
            book.open("disk", "", f"the server's own disk has {free / 2**30:.2f} GiB left")
        elif free > 3 * self._reserve:
            book.resolve("disk")
        return book.events


class _Book:
    """The alerts of one run, or of the server, as one transaction changes them."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        unresolved: set[Key],
        run: int | None,
        name: str | None,
    ) -> None:
        self._connection, self._unresolved = connection, unresolved
        self._run, self._name = run, name
        self.events: list[Event] = []

    def open(self, kind: str, metric: str, message: str) -> None:
        """Say it, unless it is being said."""
        key = (self._run, kind, metric)
        if key in self._unresolved:
            return
        pk = self._connection.execute(
            "INSERT INTO alert (run, kind, metric, message, opened) VALUES (?, ?, ?, ?, ?)",
            (*key, message, time.time()),
        ).lastrowid
        self._unresolved.add(key)
        content = {"id": pk, "run": self._name, "kind": kind, "metric": metric, "message": message}
        self.events.append(("alert", content))

    def break_rule(self, rule: str, metric: str, message: str) -> None:
        """A rule of the project's holds."""
        self.open("rule", f"{metric}: {rule}", message)

    def keep_rule(self, rule: str, metric: str) -> None:
        """It does not, or no more."""
        self.resolve("rule", f"{metric}: {rule}")

    def resolve(self, kind: str, metric: str = "") -> None:
        """It is over."""
        key = (self._run, kind, metric)
        if key in self._unresolved:
            self._unresolved.discard(key)
            self._connection.execute(
                "UPDATE alert SET resolved=? WHERE run IS ? AND kind=? AND metric=? "
                "AND resolved IS NULL",
                (time.time(), *key),
            )

    def resolve_all(self, kind: str) -> None:
        """It is over for every metric."""
        for run, other, metric in list(self._unresolved):
            if (run, other) == (self._run, kind):
                self.resolve(kind, metric)


def _kept(table: OrderedDict[Any, Any], key: tuple[int, str], make: Any) -> Any:
    """Return the entry of `key`, made if missing; the longest unused go."""
    if key not in table:
        table[key] = make()
    table.move_to_end(key)
    if len(table) > LOSSES_WATCHED:
        table.popitem(last=False)
    return table[key]
