"""Rules that people set for a project's alerts: `val/bpb > 2`, and for how long that must hold.

They are settings of kind `rules` (`PUT /settings`, `endlex alert`): the name is the comparison, as
`endlex.search` reads it, and the content may have `minutes` and `level`. For how long it has held
is kept in memory, by the times of the points: a restarted server begins anew.
"""

from __future__ import annotations

import operator
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from endlex.search import SearchError, Term, parse_search
from endlex.server.store.records import Batch, Points

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "!=": operator.ne,
}
RULES = "rules"


@dataclass(frozen=True)
class Rule:
    """One comparison of a metric with a number."""

    name: str
    term: Term
    seconds: float
    level: str


def read_rules(connection: sqlite3.Connection, run: int) -> Iterator[Rule]:
    """Yield the rules of a run's project, and those of all; what is none is passed over."""
    rows = connection.execute(
        "SELECT setting.name, content FROM setting JOIN run ON setting.project IN (run.project, ?) "
        "WHERE run.pk=? AND kind=?",
        ("", run, RULES),
    )
    for name, text in rows.fetchall():
        content = orjson.loads(text)
        content = content if isinstance(content, dict) else {}
        try:
            terms = parse_search(name)
            minutes = float(content.get("minutes") or 0)
        except (SearchError, TypeError, ValueError):
            continue
        if len(terms) == len(terms[0]) == 1 and terms[0][0].key and terms[0][0].number is not None:
            yield Rule(name, terms[0][0], minutes * 60, str(content.get("level") or "rule"))


class RuleWatch:
    """Since when each rule has held, by run, rule and metric."""

    def __init__(self) -> None:
        self._since: dict[tuple[int, str, str], float] = {}

    def observe(
        self,
        connection: sqlite3.Connection,
        run: int,
        batch: Batch,
        open_alert: Callable[[str, str, str], Any],
        resolve: Callable[[str, str], Any],
    ) -> None:
        """Judge a batch's points; `open_alert` is told rule, metric and message."""
        if not batch.points:
            return
        for rule in read_rules(connection, run):
            assert rule.term.key is not None
            for name, points in batch.points.items():
                if rule.term.key.name.matches(name) and len(points.steps):
                    key = (run, rule.name, name)
                    since = self._hold(key, rule, points)
                    last = float(points.times[-1])
                    if since is None:
                        resolve(rule.name, name)
                    elif last - since >= rule.seconds:
                        value, step = points.numbers[-1], points.steps[-1]
                        held = f" for {rule.seconds / 60:g} minutes" if rule.seconds else ""
                        said = f"{name} is {value:.6g} at step {step}: {rule.name}{held}"
                        open_alert(rule.name, name, said)

    def _hold(self, key: tuple[int, str, str], rule: Rule, points: Points) -> float | None:
        """Return since when a rule holds without a break, or None."""
        holds = OPERATORS[rule.term.operator](points.numbers, rule.term.number)
        holds = ~holds if rule.term.negated else holds
        breaks = np.flatnonzero(~holds)
        if len(breaks) and breaks[-1] == len(holds) - 1:
            self._since.pop(key, None)
            return None
        if len(breaks) or key not in self._since:
            self._since[key] = float(points.times[breaks[-1] + 1 if len(breaks) else 0])
        return self._since[key]
