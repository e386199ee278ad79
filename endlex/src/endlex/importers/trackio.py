"""Read trackio's SQLite files into run directories, one for each run in them.

Metrics, texts, tables, histograms, media, configuration and the machine's metrics are taken. A
file is `~/.cache/huggingface/trackio/PROJECT.db`, its media are in `media` beside it.

    endlex import trackio ~/.cache/huggingface/trackio
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from endlex.importers.run_directory import FoundRuns, RunWriter, find_files, numbers_of
from endlex.protocol import SYSTEM, EndlexError

RunKey = str | int | None
"""What names a run in its column: a text, but some files have numbers or NULL there."""


def find_runs(path: Path, root: Path, project: str | None) -> FoundRuns:
    """Find the databases at or below a directory, or the one that is named."""
    files = find_files(path, "*.db", ".db file: give trackio's directory or one of its files")
    return [(file, partial(import_trackio, file, root, project)) for file in files]


def import_trackio(path: Path, root: Path, project: str | None = None) -> list[RunWriter]:
    """Turn each run of a database into a run directory, or raise an `EndlexError`."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            query = f"SELECT {_run_column(database, 'metrics')}, run_name FROM metrics ORDER BY id"
            names = dict(map(tuple, database.execute(query)))
            project = project or path.stem
            return [
                _import_run(database, path, root, project, run, str(name))
                for run, name in names.items()
            ]
    except (sqlite3.Error, KeyError, IndexError) as error:
        raise EndlexError(f"{path} is no database of trackio's, or damaged: {error}") from error


def _run_column(database: sqlite3.Connection, table: str) -> str | None:
    """Return which column names the run, None if there is no table; once it was the run's name."""
    columns = {row["name"] for row in database.execute(f"PRAGMA table_info({table})")}
    return next((name for name in ("run_id", "run_name") if name in columns), None)


def _iter_rows(
    database: sqlite3.Connection, run: RunKey, table: str, skip: Callable[[str], Any] = str
) -> Iterator[tuple[sqlite3.Row, dict[str, Any]]]:
    """Yield a run's rows with what their JSON says."""
    column = _run_column(database, table)
    if column is None:
        return
    query = f"SELECT * FROM {table} WHERE {column} IS ? ORDER BY id"
    for row in database.execute(query, (run,)):
        content = None
        with suppress(ValueError, TypeError):
            content = json.loads(row["config" if table == "configs" else "metrics"])
        if isinstance(content, dict):
            yield row, content
        else:
            skip("damaged row")


def _import_run(
    database: sqlite3.Connection, path: Path, root: Path, project: str, run: RunKey, name: str
) -> RunWriter:
    rows = partial(_iter_rows, database, run)
    _, config = next(rows("configs"), (None, {}))
    created = min((_time(row) for row, _ in rows("metrics")), default=0.0)
    with RunWriter(
        root,
        tool="trackio",
        identity=f"{project}/{run}",
        project=project,
        name=name,
        created=created,
        config={key: value for key, value in config.items() if not key.startswith("_")},
        group=config.get("_Group") or None,
        run=str(run),
    ) as writer:
        for row, values in rows("metrics", writer.skip):
            writer.log((int(row["step"]), _time(row)), values, path.parent / "media")
        for row, values in rows("system_metrics", writer.skip):
            at = max(0, round(_time(row) - created)), _time(row)
            writer.metrics(at, numbers_of(values, "system/"), SYSTEM)
    return writer


def _time(row: sqlite3.Row) -> float:
    return datetime.fromisoformat(str(row["timestamp"])).timestamp()
