"""Read a task's rows: Parquet files as the hub has them, or JSON lines, plain or gzipped.

A row is a dictionary. Parquet stays as it is in memory, a row at a time becomes Python's; JSON
lines are parsed when they are read.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from archerchat.errors import DataError

Row = dict[str, Any]

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")


def read_rows(paths: Sequence[Path], columns: Sequence[str]) -> Sequence[Row]:
    """Read the rows of `paths`, one file after the other.

    Raises:
        DataError: a file is missing or broken, or lacks one of `columns`; the message names the
            file and, for JSON lines, the line.
    """
    if all(path.suffix == ".parquet" for path in paths):
        return _ParquetRows(paths, columns)
    return [row for path in paths for row in _checked_lines(path, columns)]


def iter_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each JSON value of a file of lines with its place, `name:number`; blank lines skipped.

    Raises:
        DataError: the file cannot be read, or a line is not JSON; the message says which.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path} ({reason}): check that the file is whole") from error


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}): mend or remove that line") from error


def _checked_lines(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    for where, row in iter_json_lines(path):
        missing = [name for name in columns if not isinstance(row, dict) or name not in row]
        if missing:
            raise DataError(
                f"{where}: the line has no {' and no '.join(map(repr, missing))}: each must be an "
                f"object with {', '.join(columns)}"
            )
        yield row


class _ParquetRows(Sequence[Row]):
    """The rows of Parquet files, held as Arrow does."""

    def __init__(self, paths: Sequence[Path], columns: Sequence[str]) -> None:
        self._table = pa.concat_tables([_read_parquet(path, columns) for path in paths])

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)} rows")
        rows: list[Row] = self._table.slice(index, 1).to_pylist()
        return rows[0]


def _read_parquet(path: Path, columns: Sequence[str]) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise DataError(
                    f"{path} has no column {' and no '.join(map(repr, missing))} (it has "
                    f"{', '.join(file.schema_arrow.names)}): it is another data set"
                )
            return file.read(columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"cannot read {path} as Parquet ({reason}): delete it and run the same command again"
        ) from error
