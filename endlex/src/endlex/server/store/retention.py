"""What may go: checkpoints that no rule keeps, runs that were deleted, parts that nothing uses.

A checkpoint stays when any of the rules keeps it: the last N by step, the one where a metric was
best, or every step that is a multiple of something. Only published ones are removed. Their
manifests stay, with when and why they went, so that the machine that saved them can tell that from
a loss.

A checkpoint saved with a word such as "last" (`protocol.REPLACES`) replaces the run's older ones
with the same word when it is published. This is the only way in which a box removes anything.

A part goes when no manifest uses it, in whatever state, and when it is older than a day by the
clock of its file, which is set whenever a client asks whether the part is here. Both are looked at
while `Blobs.lock` is held, as is the deletion.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import orjson

from endlex.protocol import KEEP, REMOVED, REPLACES
from endlex.server.store.blobs import Blobs
from endlex.server.store.charts import find_metric
from endlex.server.store.database import Database
from endlex.server.store.journals import JournalHashes
from endlex.server.store.queries import find_run
from endlex.server.store.series import delete_series, read_points

UNDO_SECONDS = 7 * 86400.0
"""For how long a deleted run can be brought back."""
SLICE = 200
"""Rows of series or segments deleted in one transaction, so that others get their turn."""


@dataclass(frozen=True)
class Rules:
    """What to keep of each run's checkpoints; None is no rule."""

    keep_last: int | None = None
    keep_best: str | None = None
    """A metric."""
    mode: Literal["min", "max"] = "min"
    keep_every: int | None = None
    """Steps."""

    @property
    def empty(self) -> bool:
        return self.keep_last is None and self.keep_best is None and self.keep_every is None

    def __str__(self) -> str:
        given = {
            "last": self.keep_last,
            "best": self.keep_best and f"{self.keep_best} ({self.mode})",
            "every": self.keep_every,
        }
        return ", ".join(f"keep-{rule} {value}" for rule, value in given.items() if value)


@dataclass(frozen=True)
class Saved:
    """A published checkpoint, as the rules see it."""

    pk: int
    run: str
    name: str
    step: int
    bytes: int
    metadata: dict[str, Any]
    is_apart: bool = False
    """Saved with the alias `keep`: no rule counts it, and none removes it."""

    def shown(self) -> dict[str, Any]:
        return {"run": self.run, "name": self.name, "step": self.step, "bytes": self.bytes}


@dataclass(frozen=True)
class Plan:
    """What a pruning removes, what it keeps, and the bytes of parts that then are unused."""

    removed: list[Saved]
    kept: list[Saved]
    freed_bytes: int


def plan_pruning(
    connection: sqlite3.Connection, rules: Rules, run: str | None, project: str | None
) -> Plan:
    """Apply the rules to one run, to a project's runs, or to every run; changes nothing.

    Raises:
        ApiError: 404, there is no such run.
    """
    where, values = "1", []
    if run is not None:
        where, values = "pk=?", [find_run(connection, run)]
    elif project is not None:
        where, values = "project=?", [project]  # type: ignore[list-item]
    removed: list[Saved] = []
    kept: list[Saved] = []
    for pk, run_id in connection.execute(
        f"SELECT pk, id FROM run WHERE {where}", values
    ).fetchall():
        saved = _published(connection, pk, run_id)
        keep = _kept(connection, pk, [c for c in saved if not c.is_apart], rules)
        for checkpoint in saved:
            stays = checkpoint.is_apart or checkpoint.pk in keep
            (kept if stays else removed).append(checkpoint)
    return Plan(removed, kept, freed_bytes(connection, [c.pk for c in removed]))


def _published(connection: sqlite3.Connection, run: int, run_id: str) -> list[Saved]:
    rows = connection.execute(
        "SELECT pk, name, step, bytes, metadata, aliases FROM checkpoint "
        "WHERE run=? AND state='published' ORDER BY step, created, pk",
        (run,),
    )
    return [
        Saved(pk, run_id, name, step, size, orjson.loads(metadata), KEEP in orjson.loads(aliases))
        for pk, name, step, size, metadata, aliases in rows
    ]


def _kept(connection: sqlite3.Connection, run: int, saved: list[Saved], rules: Rules) -> set[int]:
    kept: set[int] = set()
    if rules.keep_last:
        kept.update(c.pk for c in saved[-rules.keep_last :])
    if rules.keep_every:
        kept.update(c.pk for c in saved if c.step % rules.keep_every == 0)
    if rules.keep_best is not None:
        scores = _scores(connection, run, saved, rules.keep_best)
        if not scores:  # nobody knows which is best: none of them goes
            return {c.pk for c in saved}
        pick = min if rules.mode == "min" else max
        kept.add(pick(scores, key=lambda pk: scores[pk]))
    return kept


def _scores(
    connection: sqlite3.Connection, run: int, saved: list[Saved], metric: str
) -> dict[int, float]:
    """Return each checkpoint's value of a metric: in its metadata, else the last logged by then."""
    pk = find_metric(connection, run, metric)
    points = read_points(connection, pk, times=False) if pk is not None else None
    scores: dict[int, float] = {}
    for checkpoint in saved:
        value = checkpoint.metadata.get(metric)
        if not isinstance(value, int | float) and points is not None:
            at = int(np.searchsorted(points.steps, checkpoint.step, "right")) - 1
            value = float(points.numbers[at]) if at >= 0 else None
        if isinstance(value, int | float) and np.isfinite(value):
            scores[checkpoint.pk] = float(value)
    return scores


def freed_bytes(connection: sqlite3.Connection, checkpoints: list[int]) -> int:
    """Return the bytes of parts that nothing uses when these checkpoints are gone."""
    gone = orjson.dumps(checkpoints).decode()
    row = connection.execute(
        "SELECT coalesce(sum(bytes), 0) FROM (SELECT DISTINCT sha256, bytes FROM checkpoint_part "
        "WHERE checkpoint IN (SELECT value FROM json_each(:gone)) AND sha256 NOT IN "
        "(SELECT sha256 FROM media_part UNION SELECT sha256 FROM checkpoint_part "
        "WHERE checkpoint NOT IN (SELECT value FROM json_each(:gone))))",
        {"gone": gone},
    ).fetchone()
    freed: int = row[0]
    return freed


def remove_checkpoints(connection: sqlite3.Connection, checkpoints: list[int], reason: str) -> None:
    """Let go of published checkpoints' parts (`collect_parts`), and note that it was on purpose."""
    connection.executemany(
        "UPDATE checkpoint SET state=?, removed=?, reason=? WHERE pk=?",
        [(REMOVED, time.time(), reason, pk) for pk in checkpoints],
    )
    connection.executemany(
        "DELETE FROM checkpoint_part WHERE checkpoint=?", [(pk,) for pk in checkpoints]
    )


def remove_replaced(connection: sqlite3.Connection, pk: int) -> list[str]:
    """Let go of the checkpoints that a newly published one replaces, and return their names."""
    run, created, metadata = connection.execute(
        "SELECT run, created, metadata FROM checkpoint WHERE pk=?", (pk,)
    ).fetchone()
    word = orjson.loads(metadata).get(REPLACES)
    if not isinstance(word, str):
        return []
    older = connection.execute(
        "SELECT pk, name, state FROM checkpoint WHERE run=? AND created<? AND pk!=? AND state!=? "
        f"AND json_extract(metadata, '$.{REPLACES}')=?",
        (run, created, pk, REMOVED, word),
    ).fetchall()
    published = [other for other, _, state in older if state == "published"]
    remove_checkpoints(connection, published, f"replaced by a newer {word}")
    delete_checkpoints(connection, [other for other, _, _ in older if other not in published])
    return [name for _, name, _ in older]


def delete_checkpoints(connection: sqlite3.Connection, checkpoints: list[int]) -> None:
    """Forget manifests; their parts go when nothing else uses them (`collect_parts`)."""
    keys = [(pk,) for pk in checkpoints]
    connection.executemany("DELETE FROM checkpoint WHERE pk=?", keys)
    connection.executemany("DELETE FROM checkpoint_part WHERE checkpoint=?", keys)


def deleted_runs(connection: sqlite3.Connection, before: float) -> list[tuple[int, str]]:
    """Return key and id of the runs that were deleted before a moment (Unix seconds)."""
    rows = connection.execute("SELECT pk, id FROM run WHERE deleted < ?", (before,))
    return rows.fetchall()


def purge_run(database: Database, hashes: JournalHashes, run: int) -> None:
    """Remove all of a deleted run, a slice at a time; stops if it is brought back. In a thread."""
    while True:
        gone, sessions = database.write(lambda c: _purge_slice(c, run)).result()
        for session in sessions:
            hashes.forget(session)
        if gone:
            return


def _purge_slice(connection: sqlite3.Connection, run: int) -> tuple[bool, list[int]]:
    """Remove some of a run; return whether nothing is left to do, and sessions that are gone."""
    if (
        connection.execute(
            "SELECT 1 FROM run WHERE pk=? AND deleted IS NOT NULL", (run,)
        ).fetchone()
        is None
    ):
        return True, []
    series = connection.execute(
        "SELECT series.pk FROM series JOIN metric ON metric.pk = series.metric "
        "WHERE metric.run=? LIMIT ?",
        (run, SLICE),
    ).fetchall()
    for (pk,) in series:
        delete_series(connection, pk)
    segments = connection.execute(
        "DELETE FROM segment WHERE rowid IN (SELECT segment.rowid FROM segment JOIN session "
        "ON session.pk = segment.session WHERE session.run=? LIMIT ?)",
        (run, SLICE),
    ).rowcount
    if series or segments:
        return False, []
    sessions = connection.execute("SELECT pk FROM session WHERE run=?", (run,)).fetchall()
    checkpoints = connection.execute("SELECT pk FROM checkpoint WHERE run=?", (run,)).fetchall()
    delete_checkpoints(connection, [pk for (pk,) in checkpoints])
    for table in (
        "metric",
        "text",
        "data_table",
        "media",
        "media_part",
        "alert",
        "session",
        "run_config",
    ):
        connection.execute(f"DELETE FROM {table} WHERE run=?", (run,))
    connection.execute("DELETE FROM run WHERE pk=?", (run,))
    return True, [pk for (pk,) in sessions]


def collect_parts(database: Database, blobs: Blobs) -> int:
    """Delete the parts that may go, and partial ones left behind; return the bytes. In a thread."""
    freed = 0
    connection = database.reader()
    for sha256 in blobs.iter_stored():
        with blobs.lock:
            if not blobs.is_young(sha256) and not _is_used(connection, sha256):
                freed += blobs.delete(sha256)
    blobs.drop_stale_partials()
    return freed


def _is_used(connection: sqlite3.Connection, sha256: str) -> bool:
    return any(
        connection.execute(f"SELECT 1 FROM {table} WHERE sha256=? LIMIT 1", (sha256,)).fetchone()
        for table in ("checkpoint_part", "media_part")
    )


def sweep(database: Database, hashes: JournalHashes, blobs: Blobs) -> None:
    """Purge what was deleted a week ago, then collect parts; every hour, in a thread."""
    for pk, _ in deleted_runs(database.reader(), time.time() - UNDO_SECONDS):
        purge_run(database, hashes, pk)
    collect_parts(database, blobs)
