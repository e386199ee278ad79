"""Alerts: what is worth waking somebody for, found as data arrives and by a timer.

The rules, each for one run (and metric):

- `nan`: a metric of the trainer is NaN or infinite. It stays until it is dismissed or until a new
  session begins.
- `divergence`: of a metric named `loss` or `.../loss`, the exponential mean (factor 0.9, after 20
  points) is more than twice its lowest so far and at least 0.5 above it. It resolves itself when
  the mean is below again. The mean is kept in memory: a restarted server starts a new one.
- `rising`: a `val/...` metric of which less is better has risen three evaluations in a row. Names
  that have a word like accuracy, score or reward are left out. It resolves itself when the
  metric falls.
- `stall`: a running run's trainer has logged nothing for longer than the limit; resolved by data.
- `failed`: a trainer ended by an error; `crashed`: the shipper says that it is gone without a word;
  both with the reason, and resolved by a new session. `interrupted` and `finished` are told, and
  over at once.
- `lost`: nothing was heard from a running session's machine for a quarter of an hour, not even the
  shipper's heartbeat. The session's status is `lost` until something is heard, which resolves it.
- `disk`: a disk nearly full, on the training box or the server's own (an alert without a run).
- `rule`: a comparison that people set for a project, such as `val/bpb > 2` for ten minutes: a
  setting of kind `rules` (`PUT /settings`, `endlex alert`) whose name is the comparison, as
  `endlex.search` reads it, and whose content may have `minutes`. For how long it has held is kept
  in memory too, by the times of the points.
- `info`, `warning`, `error`: what the trainer says itself (`run.alert`); until a new session.

For each (run, kind, metric) there is one alert at a time: while it is unresolved, dismissed or not,
the same thing is not said again.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from sqlite3 import Connection

import numpy as np
import orjson
from numpy.typing import NDArray

from endlex.protocol import ALERT, LEVELS, LOST, MAX_REASON_CHARS, SESSION, SYSTEM, TRAINER
from endlex.search import COMPARISONS, SearchError, Term, parse_search
from endlex.server.events import Event
from endlex.server.settings import DataDir, Settings
from endlex.server.store.database import insert, update
from endlex.server.store.records import Batch, Points
from endlex.server.store.sessions import SessionState, update_run, was_resumed

SMOOTHING = 0.9
WARM_UP = 20
DIVERGED_RATIO = 2.0
DIVERGED_RISE = 0.5
RISES = 3
_MORE = (
    "acc|[a-z]*accurac(?:y|ies)|[a-z]*scores?|rewards?|(?:chat)?core|f1|bleu|rouge|exact|pass|wins?"
    "|recall|precision|(?:pass|success|win)_?rates?|mfu|per_second"
)
_LESS = "loss|losses|perplexity|ppl|errors?|inaccuracy|seconds"
MORE_IS_BETTER, LESS_IS_BETTER = (
    re.compile(f"(?<![a-z])(?:{words})(?![a-z])") for words in (_MORE, _LESS)
)
"""Words of metrics' names, as in the dashboard's `format.js`; metric_names.json tests both."""
DISK_PERCENT = re.compile(r"disk.*(percent|used_pct|_pct|%)")
DISK_FULL_PERCENT = 95.0
DISK_FINE_PERCENT = 92.0
DISK_FREE = re.compile(r"(?:disk|home).*free.*(bytes|gib|gb)")
DISK_UNITS = {"bytes": 1, "gib": 2**30, "gb": 1e9}
DISK_FREE_BYTES = 2 * 2**30
ENDS = {
    "failed": "the trainer ended by an error",
    "crashed": "the trainer is gone",
    "interrupted": "the trainer was interrupted",
    "finished": "the trainer has finished",
}
"""The message for each way in which a session ends."""
LOST_SECONDS = 900.0
"""How long after its last heartbeat (one comes every 20 seconds) a session counts as lost."""
METRICS_WATCHED = 10_000
QUIET_AFTER = 7 * 86400.0
"""Seconds after which a run that fell silent is history, not news."""


@dataclass
class _Trend:
    """Where a loss or an evaluation has been heading."""

    mean: float = 0.0
    lowest: float = math.inf
    count: int = 0
    last: list[float] = field(default_factory=list)

    def add(self, numbers: NDArray[np.float64]) -> None:
        finite = numbers[np.isfinite(numbers)].tolist()
        self.last = [*self.last, *finite][-RISES - 1 :]
        for number in finite:
            self.count += 1
            factor = min(SMOOTHING, 1 - 1 / self.count)
            self.mean = factor * self.mean + (1 - factor) * number
            if self.count >= WARM_UP and self.mean < self.lowest:
                self.lowest = self.mean

    @property
    def has_diverged(self) -> bool:
        rise = self.mean - self.lowest
        return self.lowest > 0 and rise > max((DIVERGED_RATIO - 1) * self.lowest, DIVERGED_RISE)

    @property
    def rises(self) -> list[bool]:
        return [later > earlier for earlier, later in pairwise(self.last)]


class Watch:
    """Opens and resolves alerts, in the database's writer thread."""

    def __init__(self, settings: Settings, data: DataDir) -> None:
        self._data = data
        self._stall_seconds = settings.stall_minutes * 60
        self._reserve = settings.reserve(data.root)
        self._trends: defaultdict[tuple[int | None, str], _Trend] = defaultdict(_Trend)
        self._since: dict[tuple[int | None, str, str], float] = {}
        """Since when each rule has held, by run, rule and metric."""
        self._started = time.time()
        self._is_doubted = False

    def doubt(self) -> None:
        """Forget trends before the next batch, in any thread: one was undone and comes again."""
        self._is_doubted = True

    def observe(self, db: Connection, state: SessionState, batch: Batch) -> list[Event]:
        """Open and resolve alerts for one batch of a session; return what readers should hear."""
        if self._is_doubted:
            self._is_doubted = False
            self._trends.clear()
            self._since.clear()
        book = Book(db, state.run, [])
        self._judge_rules(book, batch)
        if state.kind == SYSTEM:
            for name, points in batch.points.items():
                _watch_disk(book, name, float(points.numbers[-1]))
            return book.events
        book.resolve("stall", "lost")
        if batch.records[SESSION]:
            book.resolve(*ENDS, *LEVELS, "nan")
        for name, points in batch.points.items():
            self._watch_metric(book, name, points)
        news = time.time() - QUIET_AFTER
        for record in batch.records[ALERT]:
            if record["time"] > news:
                book.resolve(record["level"], metric=record["title"])  # the latest one is told
                said = ": ".join(filter(None, (record["title"], record["text"])))
                book.tell(record["level"], record["title"], said)
        end = batch.finish
        if end and end["time"] > news:
            reason = str(end.get("reason") or "")[:MAX_REASON_CHARS]
            book.tell_end(state, end["status"], reason)
        return book.events

    def sweep(self, db: Connection) -> list[Event]:
        """Look for problems that no data shows: silence, and the server's own disk filling up."""
        now, events = time.time(), list[Event]()
        free = shutil.disk_usage(self._data.root).free
        said = f"the server's own disk has {free / 2**30:.2f} GiB left"
        full, fine = free < 2 * self._reserve, free > 3 * self._reserve
        Book(db, None, events).judge("disk", "", said, begins=full, ends=fine)
        if now - self._started >= LOST_SECONDS:
            _mark_lost(db, now, events)
        rows = db.execute(
            "SELECT run.pk, max(session.last_seen) FROM run JOIN session "
            "ON session.run = run.pk WHERE run.status='running' AND run.archived=0 "
            "AND run.deleted IS NULL AND session.kind=? GROUP BY run.pk",
            (TRAINER,),
        ).fetchall()
        for run, seen in rows:
            silent = now - max(seen, self._started)
            if now - seen < QUIET_AFTER and silent > self._stall_seconds:
                said = f"nothing was logged for {silent / 60:.0f} minutes"
                Book(db, run, events).tell("stall", "", said)
        return events

    def _judge_rules(self, book: Book, batch: Batch) -> None:
        """Compare a batch's points with the rules of the run's project and of all projects.

        An unreadable rule, and one that has not held for long enough yet, is skipped.
        """
        if not batch.points:
            return
        rows = book.db.execute(
            "SELECT setting.name, content FROM setting JOIN run "
            "ON setting.project IN (run.project, '') WHERE run.pk=? AND kind='rules'",
            (book.run,),
        )
        for rule, content in rows.fetchall():
            try:
                ((term,),) = parse_search(rule)
                minutes = float(orjson.loads(content).get("minutes") or 0)
            except (SearchError, TypeError, ValueError):  # unreadable, or not one comparison
                continue
            for name, points in batch.points.items():
                # A word, and a comparison with a text, say nothing of a metric's numbers.
                if term.key is None or term.number is None or not term.key.name.matches(name):
                    continue
                since = self._hold((book.run, rule, name), term, points)
                held = f" for {minutes:g} minutes" if minutes else ""
                value, step, now = points.numbers[-1], points.steps[-1], float(points.times[-1])
                said = f"{name} is {value:.6g} at step {step}: {rule}{held}"
                begins = since is not None and now - since >= 60 * minutes
                book.judge("rule", f"{name}: {rule}", said, begins=begins, ends=since is None)

    def _hold(self, key: tuple[int | None, str, str], term: Term, points: Points) -> float | None:
        """Return since when a rule holds without a break, or None."""
        holds = np.asarray(COMPARISONS[term.operator](points.numbers, term.number)) != term.negated
        first = int(np.flatnonzero(~holds)[-1]) + 1 if not holds.all() else 0
        if first:
            self._since.pop(key, None)
        return self._since.setdefault(key, float(points.times[first])) if holds[-1] else None

    def _watch_metric(self, book: Book, name: str, points: Points) -> None:
        finite = np.isfinite(points.numbers)
        if not finite.all():
            at = int(np.argmin(finite))
            book.tell("nan", name, f"{name} is {points.numbers[at]} at step {points.steps[at]}")
        is_loss = name == "loss" or name.endswith("/loss")
        is_evaluation = name.startswith("val/") and not is_more_better(name)
        if not is_loss and not is_evaluation:
            return
        trend = self._trends[book.run, name]
        trend.add(points.numbers)
        if len(self._trends) > METRICS_WATCHED:
            del self._trends[next(iter(self._trends))]
        diverged, rises = trend.has_diverged, trend.rises
        if is_loss:
            said = f"{name} is {trend.mean:.4g} (smoothed) at step {points.steps[-1]}; "
            said += f"its lowest was {trend.lowest:.4g}"
            book.judge("divergence", name, said, begins=diverged, ends=not diverged)
        if is_evaluation and rises:
            shown = ", ".join(f"{n:.5g}" for n in trend.last)
            said = f"{name} has risen {RISES} evaluations in a row: {shown}"
            risen = len(rises) == RISES and all(rises)
            book.judge("rising", name, said, begins=risen, ends=not rises[-1])


def _mark_lost(db: Connection, now: float, events: list[Event]) -> None:
    """Mark running sessions as lost that sent nothing although the server was up."""
    rows = db.execute(
        "SELECT session.pk, run.pk, session.kind, coalesce(heard, last_seen) AS last, updated "
        "FROM session JOIN run ON run.pk = session.run WHERE session.status='running' AND last < ?",
        (now - LOST_SECONDS,),
    ).fetchall()
    for session, run, kind, heard, updated in rows:
        update(db, "session", session, status=LOST)
        events.append(update_run(db, run, updated))
        if kind == TRAINER and now - heard < QUIET_AFTER:
            book, silent = Book(db, run, events), f"{(now - heard) / 60:.0f} minutes"
            book.resolve("stall")
            book.tell("lost", "", f"nothing was heard of the training box for {silent}")


def is_more_better(name: str) -> bool:
    """Tell by the words of a metric's name whether more is better; of a loss it never is."""
    text = re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
    return bool(MORE_IS_BETTER.search(text)) and not LESS_IS_BETTER.search(text)


def _watch_disk(book: Book, name: str, last: float) -> None:
    if DISK_PERCENT.search(name.lower()):
        full, fine = last >= DISK_FULL_PERCENT, last < DISK_FINE_PERCENT
        said = f"is {last:.0f} % full"
    elif match := DISK_FREE.search(name.lower()):
        free = last * DISK_UNITS[match.group(1)]
        full, fine = free < DISK_FREE_BYTES, free > 1.5 * DISK_FREE_BYTES
        said = f"has {free / 2**30:.2f} GiB left"
    else:
        return
    book.judge("disk", name, f"a disk of the training box {said}", begins=full, ends=fine)


class Book:
    """The unresolved alerts of one run, or of the server; each change is added to `events`."""

    def __init__(self, db: Connection, run: int | None, events: list[Event]) -> None:
        self.db, self.run, self.events = db, run, events
        query = "SELECT kind, metric FROM alert WHERE run IS ? AND resolved IS NULL"
        self._unresolved: set[tuple[str, str]] = set(db.execute(query, (run,)))

    def judge(self, kind: str, metric: str, message: str, *, begins: bool, ends: bool) -> None:
        """Open an alert where it begins, unless it is open; resolve it where it ends."""
        if begins:
            self.tell(kind, metric, message)
        elif ends:
            self.resolve(kind, metric=metric)

    def tell(self, kind: str, metric: str, message: str) -> None:
        """Open an alert, unless it is open."""
        if (kind, metric) in self._unresolved:
            return
        self._unresolved.add((kind, metric))
        about = {"kind": kind, "metric": metric, "message": message}
        pk = insert(self.db, "alert", run=self.run, opened=time.time(), **about)
        found = self.db.execute("SELECT id FROM run WHERE pk=?", (self.run,)).fetchone()
        self.events.append(("alert", {"id": pk, "run": found and found[0], **about}))

    def resolve(self, *kinds: str, metric: str | None = None) -> None:
        """Alerts of these kinds are over: those of a metric, or all."""
        over = [k for k in self._unresolved if k[0] in kinds and metric in (None, k[1])]
        self._unresolved.difference_update(over)
        self.db.executemany(
            "UPDATE alert SET resolved=? WHERE run IS ? AND kind=? AND metric=? "
            "AND resolved IS NULL",
            [(time.time(), self.run, *key) for key in over],
        )

    def tell_end(self, state: SessionState, status: str, reason: str | None) -> None:
        """Alert that a trainer ended, and why, unless a later session has resumed the run."""
        if state.kind == TRAINER and not was_resumed(self.db, state):
            self.tell(status, "", ": ".join(filter(None, (ENDS[status], reason))))
            if status in ("finished", "interrupted"):
                self.resolve(status)
