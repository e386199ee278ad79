"""Alert rules that people set for a project, such as `val/bpb > 2` for ten minutes.

They are settings of kind `rules` (`PUT /settings`, `endlex alert`): the name is the comparison, as
`endlex.search` reads it, and the content may have `minutes`. For how long it has held is kept in
memory, by the times of the points: a restarted server starts counting again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import numpy as np
import orjson

from endlex.search import COMPARISONS, SearchError, Term, parse_search
from endlex.server.store.records import Batch, Points

Rule = tuple[str, Term, float]
"""A rule's name, its comparison of a metric with a number, and the seconds it must hold for."""


def read_rules(connection: sqlite3.Connection, run: int) -> Iterator[Rule]:
    """Yield the rules for a run's project and for all projects; unreadable ones are skipped."""
    rows = connection.execute(
        "SELECT setting.name, content FROM setting JOIN run ON setting.project IN (run.project, '')"
        " WHERE run.pk=? AND kind='rules'",
        (run,),
    )
    for name, content in rows.fetchall():
        try:
            terms = parse_search(name)
            seconds = 60 * float(orjson.loads(content).get("minutes") or 0)
        except (SearchError, TypeError, ValueError):
            continue
        (term, *others), *more = terms
        if term.key and term.number is not None and not others and not more:
            yield name, term, seconds


class RuleWatch:
    """Since when each rule has held, by run, rule and metric."""

    def __init__(self) -> None:
        self._since: dict[tuple[int, str, str], float] = {}

    def judge(
        self, connection: sqlite3.Connection, run: int, batch: Batch
    ) -> Iterator[tuple[str, str, str | None]]:
        """Yield rule, metric and message for a batch's points; None where the rule does not hold.

        A rule that has not held for long enough yet is skipped.
        """
        for rule, term, seconds in read_rules(connection, run) if batch.points else ():
            assert term.key is not None
            for name, points in batch.points.items():
                if not term.key.name.matches(name):
                    continue
                since = self._hold((run, rule, name), term, points)
                if since is None:
                    yield rule, name, None
                elif float(points.times[-1]) - since >= seconds:
                    value, step = points.numbers[-1], points.steps[-1]
                    held = f" for {seconds / 60:g} minutes" if seconds else ""
                    yield rule, name, f"{name} is {value:.6g} at step {step}: {rule}{held}"

    def _hold(self, key: tuple[int, str, str], term: Term, points: Points) -> float | None:
        """Return since when a rule holds without a break, or None."""
        holds = np.asarray(COMPARISONS[term.operator](points.numbers, term.number)) != term.negated
        breaks = np.flatnonzero(~holds)
        if len(breaks) and breaks[-1] == len(holds) - 1:
            self._since.pop(key, None)
            return None
        if len(breaks) or key not in self._since:
            self._since[key] = float(points.times[breaks[-1] + 1 if len(breaks) else 0])
        return self._since[key]
