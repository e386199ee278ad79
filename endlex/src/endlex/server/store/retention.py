"""Removal of checkpoints that no rule keeps, of deleted runs, and of parts that nothing uses.

A checkpoint stays when any of the rules keeps it: the last N by step, the one where a metric was
best, or every step that is a multiple of something. Only published ones are removed. Their
manifests stay, with when and why they went, so that the machine that saved them can tell that from
a loss.

A checkpoint saved with a word such as "last" (`protocol.REPLACES`) replaces the run's older ones
with the same word when it is published. This is the only way in which a box removes anything.

A part goes when no manifest uses it, in whatever state, and when it is older than a day by the
clock of its file, which is set whenever a client asks whether the part is here (`Blobs.collect`).
"""

from __future__ import annotations

import time
from functools import partial
from itertools import groupby
from operator import itemgetter
from sqlite3 import Connection
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from pydantic import BaseModel, Field

from endlex.protocol import KEEP, REMOVED, REPLACES
from endlex.server.errors import ApiError
from endlex.server.store.blobs import Blobs
from endlex.server.store.charts import find_metric
from endlex.server.store.database import Database, dicts, update
from endlex.server.store.runs import find_run
from endlex.server.store.series import delete_series, read_points

UNDO_SECONDS = 7 * 86400.0
"""Seconds during which a deleted run can be brought back."""
SLICE = 200
"""Rows of series or segments deleted per transaction, so that other writes get their turn."""
RUN_TABLES = (
    *("metric", "text", "data_table", "media", "media_part", "alert"),
    *("session", "run_config", "checkpoint"),
)
"""Tables with a column `run`."""

FREED_BYTES = """
SELECT coalesce(sum(bytes), 0) FROM (
    WITH gone AS (SELECT value FROM json_each(:gone))
    SELECT DISTINCT sha256, bytes FROM checkpoint_part WHERE checkpoint IN gone AND sha256 NOT IN (
        SELECT sha256 FROM media_part
        UNION SELECT sha256 FROM checkpoint_part WHERE checkpoint NOT IN gone))
"""
"""Asks for the bytes of parts that nothing uses when some checkpoints are gone."""
Count = Annotated[int, Field(ge=1)]


class Pruning(BaseModel, frozen=True, strict=True):
    """What to keep of each run's checkpoints, where None is no rule, and what else to remove."""

    keep_last: Count | None = None
    keep_best: str | None = None
    """A metric."""
    mode: Literal["min", "max"] = "min"
    keep_every: Count | None = None
    """Steps."""
    run: str | None = None
    project: str | None = None
    deleted: bool = False
    """Whether to remove deleted runs for good, too."""
    dry_run: bool = False

    @property
    def rules(self) -> str:
        """The rules in words; empty if there are none."""
        best = self.keep_best and f"{self.keep_best} ({self.mode})"
        given = {"last": self.keep_last, "best": best, "every": self.keep_every}
        return ", ".join(f"keep-{rule} {value}" for rule, value in given.items() if value)


def prune(db: Connection, asked: Pruning) -> dict[str, Any]:
    """Remove what the rules do not keep of one run, of a project's runs, or of every run.

    In a dry run nothing changes, and the answer is what would be removed and kept, and the bytes
    of parts that nothing would use. An unknown run is an `ApiError` 404.
    """
    if asked.run is not None:
        find_run(db, asked.run)
    published = dicts(
        db,
        "SELECT checkpoint.pk, run.pk AS number, run.id AS run, checkpoint.name, step, bytes, "
        "aliases, metadata FROM checkpoint JOIN run ON run.pk = checkpoint.run "
        "WHERE state='published' AND coalesce(run.id = :run, project = :project, 1) "
        "ORDER BY run.pk, step, checkpoint.created, checkpoint.pk",
        {"run": asked.run, "project": asked.project},
    )
    kept: set[int] = set()
    for number, saved in groupby(published, itemgetter("number")):
        kept |= _kept(db, number, list(saved), asked)
    removed = [checkpoint["pk"] for checkpoint in published if checkpoint["pk"] not in kept]
    (freed,) = db.execute(FREED_BYTES, {"gone": orjson.dumps(removed).decode()}).fetchone()
    answer: dict[str, Any] = {"removed": [], "kept": [], "freed_bytes": freed}
    for checkpoint in published:
        shown = {key: checkpoint[key] for key in ("run", "name", "step", "bytes")}
        answer["kept" if checkpoint["pk"] in kept else "removed"].append(shown)
    if not asked.dry_run:
        remove_checkpoints(db, removed, f"pruned by {asked.rules}")
    return answer


def _kept(db: Connection, run: int, saved: list[dict[str, Any]], rules: Pruning) -> set[int]:
    kept = {c["pk"] for c in saved if KEEP in c["aliases"]}
    saved = [c for c in saved if c["pk"] not in kept]
    if rules.keep_last:
        kept.update(c["pk"] for c in saved[-rules.keep_last :])
    if rules.keep_every:
        kept.update(c["pk"] for c in saved if c["step"] % rules.keep_every == 0)
    if rules.keep_best is not None:
        scores = _scores(db, run, saved, rules.keep_best)
        if not scores:  # nobody knows which is best: none of them goes
            return kept.union(c["pk"] for c in saved)
        pick = min if rules.mode == "min" else max
        kept.add(pick(scores, key=lambda pk: scores[pk]))
    return kept


def _scores(db: Connection, run: int, saved: list[dict[str, Any]], metric: str) -> dict[int, float]:
    """Return each checkpoint's value of a metric: in its metadata, else the last logged by then."""
    points = read_points(db, find_metric(db, run, metric), times=False)
    scores: dict[int, float] = {}
    for checkpoint in saved:
        value = checkpoint["metadata"].get(metric)
        if not isinstance(value, int | float):
            at = int(np.searchsorted(points.steps, checkpoint["step"], "right")) - 1
            value = float(points.numbers[at]) if at >= 0 else None
        if isinstance(value, int | float) and np.isfinite(value):
            scores[checkpoint["pk"]] = float(value)
    return scores


def remove_checkpoints(db: Connection, checkpoints: list[int], reason: str) -> None:
    """Remove checkpoints: of published ones the manifest stays, with when and why they went.

    Their parts are deleted once nothing else uses them (`collect_parts`).
    """
    now = time.time()
    for pk in checkpoints:
        db.execute("DELETE FROM checkpoint_part WHERE checkpoint=?", (pk,))
        db.execute("DELETE FROM checkpoint WHERE pk=? AND state != 'published'", (pk,))
        update(db, "checkpoint", pk, state=REMOVED, removed=now, reason=reason)


def remove_checkpoint(db: Connection, run: str, name: str, reason: str) -> None:
    """Remove one checkpoint by its name; an unknown one is an `ApiError` 404."""
    row = db.execute(
        "SELECT pk FROM checkpoint WHERE run=? AND name=? AND state != ?",
        (find_run(db, run), name, REMOVED),
    ).fetchone()
    if row is None:
        raise ApiError(404, f"checkpoint {name[:120]!r} of run {run!r} is not here")
    remove_checkpoints(db, [row[0]], reason)


def remove_replaced(db: Connection, pk: int) -> list[str]:
    """Remove the checkpoints that a newly published one replaces, and return their names."""
    run, created, metadata = db.execute(
        "SELECT run, created, metadata FROM checkpoint WHERE pk=?", (pk,)
    ).fetchone()
    word = orjson.loads(metadata).get(REPLACES)
    if not isinstance(word, str):
        return []
    older = db.execute(
        "SELECT pk, name FROM checkpoint WHERE run=? AND created<? AND pk!=? AND state!=? "
        f"AND json_extract(metadata, '$.{REPLACES}')=?",
        (run, created, pk, REMOVED, word),
    ).fetchall()
    remove_checkpoints(db, [other for other, _ in older], f"replaced by a newer {word}")
    return [name for _, name in older]


def purge_runs(
    database: Database, before: float, only: str | None = None, dry: bool = False
) -> list[str]:
    """Remove all of the runs that were deleted before a moment (Unix seconds); return their ids.

    A run goes a slice at a time, and no further if it is brought back. Call it in a thread.
    """
    query = "SELECT pk, id FROM run WHERE deleted < ? AND id = coalesce(?, id)"
    runs = database.reader().execute(query, (before, only)).fetchall()
    for pk, _ in () if dry else runs:
        while not database.write(partial(_purge_slice, run=pk)).result():
            pass
    return [run for _, run in runs]


def _purge_slice(db: Connection, run: int) -> bool:
    """Remove some of a run; return whether nothing is left to do."""
    query = "SELECT 1 FROM run WHERE pk=? AND deleted IS NOT NULL"
    if db.execute(query, (run,)).fetchone() is None:
        return True
    series = db.execute(
        "SELECT series.pk FROM series JOIN metric ON metric.pk = series.metric "
        "WHERE metric.run=? LIMIT ?",
        (run, SLICE),
    ).fetchall()
    for (pk,) in series:
        delete_series(db, pk)
    segments = db.execute(
        "DELETE FROM segment WHERE rowid IN (SELECT segment.rowid FROM segment JOIN session "
        "ON session.pk = segment.session WHERE session.run=? LIMIT ?)",
        (run, SLICE),
    ).rowcount
    if series or segments:
        return False
    parts = (
        "DELETE FROM checkpoint_part WHERE checkpoint IN (SELECT pk FROM checkpoint WHERE run=?)"
    )
    db.execute(parts, (run,))
    for table in RUN_TABLES:
        db.execute(f"DELETE FROM {table} WHERE run=?", (run,))
    db.execute("DELETE FROM run WHERE pk=?", (run,))
    return True


def collect_parts(database: Database, blobs: Blobs) -> None:
    """Delete the parts that may go. In a thread."""
    db = database.reader()
    query = (
        "SELECT EXISTS (SELECT 1 FROM checkpoint_part WHERE sha256=?1) "
        "OR EXISTS (SELECT 1 FROM media_part WHERE sha256=?1)"
    )
    blobs.collect(lambda sha256: db.execute(query, (sha256,)).fetchone()[0])


def sweep(database: Database, blobs: Blobs) -> None:
    """Purge what was deleted a week ago, then collect parts; every hour, in a thread."""
    purge_runs(database, time.time() - UNDO_SECONDS)
    collect_parts(database, blobs)
