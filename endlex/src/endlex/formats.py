"""A run as a file that others read: CSV, JSON or Parquet.

The server and `endlex export` (of a run's directory) write the same. All points are in it, none
downsampled. CSV and Parquet have a row per point: metric, step, time, value. JSON has everything
else too that the run's journals say, and nothing that only a server knows.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import IO, Any

from endlex.protocol import EndlexError, encode_number

RUN_KEYS = ("run", "project", "name", "status", "created", "tags", "group", "notes", "host")
SESSION_KEYS = ("session", "kind", "rank", "host", "started", "offset", "damaged_lines", "status")
CHECKPOINT_KEYS = ("name", "step", "bytes", "aliases", "metadata")
COLUMNS = ("metric", "step", "time", "value")
POINTS_AT_ONCE = 20_000
"""Encoding more at once would keep every other thread waiting."""

Series = tuple[str, Sequence[int], Sequence[float], Sequence[float]]
"""A metric's name and its points' steps (rising, each once), times and values."""


def write_run(
    file: IO[bytes],
    kind: str,
    run: Mapping[str, Any],
    series: Iterable[Series],
    records: Mapping[str, Iterable[Mapping[str, Any]]],
) -> None:
    """Write a run, as `GET /runs/{run}` answers, as csv, json or parquet.

    Records are `texts` and `tables`, latest steps first; only JSON has them. Where pyarrow is not
    installed, which Parquet needs, that is an `EndlexError`.
    """
    if kind == "parquet":
        _write_parquet(file, run, series)
    elif kind == "csv":
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        rows = csv.writer(text)
        rows.writerow(COLUMNS)
        for name, steps, times, values in series:
            encoded = map(encode_number, values)
            rows.writerows(zip(repeat(name), steps, times, encoded, strict=False))
        text.detach()  # the file is the caller's to close
    else:
        file.writelines(piece.encode() for piece in _iter_json(run, series, records))


def _iter_json(
    run: Mapping[str, Any], series: Iterable[Series], records: Mapping[str, Iterable[Any]]
) -> Iterator[str]:
    checkpoints = sorted(run["checkpoints"], key=lambda checkpoint: int(checkpoint["step"]))
    head = {key: run[key] for key in (*RUN_KEYS, "config")}
    head["sessions"] = [{key: one[key] for key in SESSION_KEYS} for one in run["sessions"]]
    head["checkpoints"] = [{key: one[key] for key in CHECKPOINT_KEYS} for one in checkpoints]
    yield _dumps(head)[:-1]
    for key, found in records.items():
        yield f', "{key}": '
        yield from _iter_array([record] for record in found)
    yield ', "series": {'
    for number, (name, *columns) in enumerate(series):
        yield (", " if number else "") + _dumps(name)
        for place, (key, column) in enumerate(zip(COLUMNS[1:], columns, strict=True)):
            yield f'{", " if place else ": {"}"{key}": '
            starts = range(0, len(column), POINTS_AT_ONCE)
            slices = (column[start : start + POINTS_AT_ONCE] for start in starts)
            yield from _iter_array(list(map(encode_number, part)) for part in slices)
        yield "}"
    yield "}}\n"


def _iter_array(pieces: Iterable[list[Any]]) -> Iterator[str]:
    """Yield a JSON array, a few of its elements at a time."""
    yield "["
    for place, piece in enumerate(pieces):
        yield (", " if place else "") + _dumps(piece)[1:-1]
    yield "]"


def _dumps(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False)


def _write_parquet(file: IO[bytes], run: Mapping[str, Any], series: Iterable[Series]) -> None:
    """Write points, a row group per metric, with what else is known of the run as metadata."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise EndlexError("Parquet needs pyarrow: pip install pyarrow, or give csv") from error
    kinds = (pa.dictionary(pa.int32(), pa.string()), pa.int64(), pa.float64(), pa.float64())
    schema = pa.schema(zip(COLUMNS, kinds, strict=True), metadata={"endlex": _dumps(run)})
    with pq.ParquetWriter(file, schema) as writer:
        for name, *columns in series:
            names = pa.array([name] * len(columns[0]), kinds[0])
            writer.write_table(pa.table([names, *columns], schema=schema))
