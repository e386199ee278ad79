"""Read the Parquet files of `neptune-exporter` into run directories, one for each run in them.

A row is one value of one attribute of a run; its columns are those of the exporter's documentation.
Series become metrics, texts and histograms, single values the configuration; files and series of
files are taken from the directory `files` beside that of the Parquet files.

    endlex import neptune exports/data
"""

from __future__ import annotations

import math
from collections import defaultdict
from datetime import datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from endlex.client.log import read_file
from endlex.importers.run_directory import FoundRuns, RunWriter, find_files, inside, load
from endlex.protocol import EndlexError

SINGLE = ("float", "int", "string", "bool", "datetime", "string_set")
COLUMNS = {"project_id", "run_id", "attribute_path", "attribute_type"}
Row = dict[str, Any]


def find_runs(path: Path, root: Path, project: str | None) -> FoundRuns:
    """Find the Parquet files of each run at or below `path`: a long run is several files."""
    runs: dict[str, list[Path]] = defaultdict(list)
    what = ".parquet file: give neptune-exporter's data directory"
    for file in find_files(path, "*.parquet", what):
        runs[str(file).rpartition("_part_")[0] or str(file)].append(file)
    return [(files[0], partial(import_neptune, files, root, project)) for files in runs.values()]


def import_neptune(paths: list[Path], root: Path, project: str | None = None) -> RunWriter:
    """Turn the Parquet files of one run into a run directory, or raise an `EndlexError`."""
    rows = _read_rows(paths)
    if not rows:
        raise EndlexError(f"{paths[0]} is empty")
    first, single = rows[0], [row for row in rows if row["attribute_type"] in SINGLE]
    config = {row["attribute_path"]: row.get(f"{row['attribute_type']}_value") for row in single}
    times = [row["timestamp"].timestamp() for row in rows if row.get("timestamp")]
    created = config.get("sys/creation_time")
    began = min(times, default=created.timestamp() if isinstance(created, datetime) else 0.0)
    files = next((p / "files" for p in paths[0].parents if (p / "files").is_dir()), None)
    with RunWriter(
        root,
        tool="neptune",
        identity=f"{first['project_id']}/{first['run_id']}",
        project=project or first["project_id"],
        name=config.get("sys/name") or first["run_id"],
        created=began,
        config={key: value for key, value in config.items() if not key.startswith("sys/")},
        tags=config.get("sys/tags") or (),
        notes=str(config["sys/description"]) if config.get("sys/description") else None,
        run=str(first["run_id"]),
    ) as writer:
        for row in rows:
            if row["attribute_type"] not in SINGLE:
                _write_row(writer, row, began, files)
    return writer


def _read_rows(paths: list[Path]) -> list[Row]:
    rows: list[Row] = []
    parquet = load("pyarrow.parquet")
    for path in paths:
        try:
            table = parquet.read_table(path)
        except Exception as error:  # pyarrow's own
            raise EndlexError(f"{path} cannot be read: {error}") from error
        if lacking := COLUMNS - {*table.column_names}:
            raise EndlexError(f"{path} is not neptune-exporter's: it has no column {lacking.pop()}")
        rows += table.to_pylist()
    return rows


def _write_row(writer: RunWriter, row: Row, began: float, files: Path | None) -> None:
    kind, name = row["attribute_type"], row["attribute_path"]
    step = row.get("step") or Decimal(0)
    if step != int(step):
        writer.skip("step that is not whole")
        return
    at = int(step), row["timestamp"].timestamp() if row.get("timestamp") else began
    if kind == "float_series":
        value = row["float_value"]
        writer.metrics(at, {name: math.nan if value is None else value})
    elif kind == "string_series":
        writer.text(at, name, str(row["string_value"]))
    elif kind == "histogram_series":
        histogram = row["histogram_value"]
        writer.histogram(at, name, histogram["edges"], histogram["values"])
    elif kind in ("file", "file_series"):
        path = (row.get("file_value") or {}).get("path")
        if files and path and (place := inside(files, path)):
            writer.media(at, name, *read_file(place))
        else:
            writer.skip("file that is not here")
    else:
        writer.skip(kind)
