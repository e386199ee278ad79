"""Read the rows of tasks: from the hub's Parquet exports at pinned revisions, or from local files.

`tables.toml` lists the data sets. Downloads are kept under the home's cache, in one directory per
repository and revision. A local folder can replace them (`--data-dir`). A row is a dictionary.
Parquet stays in memory as Arrow, and each row is converted when it is asked for; JSON lines are
parsed when they are read.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from archerchat.downloads import Notify, download_file
from archerchat.errors import DataError, UsageError
from archerchat.tasks.base import Rows, Task
from archerchat.text_files import iter_rows

Row = dict[str, Any]
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Table:
    """A data set's splits, on the hub and in a local folder."""

    repository: str
    revision: str
    folder: str
    """Folder of the files in the repository."""
    splits: Mapping[str, int]
    """Number of files per split."""
    columns: Sequence[str]
    local: str
    """A split's file in a local folder, without its suffix; `{split}` stands for its name."""

    def files(self, split: str) -> list[str]:
        """Return the split's files in the repository; a UsageError if there is no such split."""
        if split not in self.splits:
            raise UsageError(
                f"{self.repository} has no split {split!r}: choose from {', '.join(self.splits)}"
            )
        count = self.splits[split]
        return [f"{self.folder}/{split}-{i:05d}-of-{count:05d}.parquet" for i in range(count)]


@cache
def load_tables() -> dict[str, Table]:
    """Return the tables by the names of their tasks."""
    content = tomllib.loads(Path(__file__).with_name("tables.toml").read_text(encoding="utf-8"))
    return {name: Table(**fields) for name, fields in content.items()}


@dataclass(frozen=True)
class TaskFiles:
    """Find a table's files and download missing ones. Among several ranks, one must do it first."""

    cache: Path
    """Folder for downloads."""
    local: Path | None = None
    """Folder of files to use instead of the hub's; nothing is downloaded then."""
    notify: Notify = lambda message: None

    def rows(self, table: Table, split: str) -> Rows:
        """Read the rows of a split.

        Raises:
            DataError: a file is missing, cannot be downloaded, or is broken.
        """
        names = table.files(split)
        if self.local is None:
            paths = [self._fetch(table, name) for name in names]
        else:
            paths = [_find_local(self.local, table.local.format(split=split))]
        return read_rows(paths, table.columns)

    def _fetch(self, table: Table, name: str) -> Path:
        path = self.cache / table.repository.replace("/", "--") / table.revision[:12] / name
        if not path.exists():
            from huggingface_hub import hf_hub_url

            self.notify(f"fetching {name} of {table.repository}")
            download_file(
                hf_hub_url(table.repository, name, repo_type="dataset", revision=table.revision),
                path,
                lambda part: _read_parquet([part], ()),  # its columns are checked later
                without_network="--data-dir names a folder with local files instead",
                token=None,
                notify=self.notify,
            )
        return path


def _find_local(folder: Path, stem: str) -> Path:
    for suffix in SUFFIXES:
        if (path := folder / f"{stem}{suffix}").is_file():
            return path
    parent = (folder / stem).parent
    there = sorted(path.name for path in parent.iterdir()) if parent.is_dir() else []
    raise DataError(
        f"{folder} has no {stem} with one of {', '.join(SUFFIXES)} (in {parent} there is "
        f"{', '.join(there) or 'nothing'}): add it, or leave --data-dir out to download it"
    )


class TableTask(Task):
    """A task that reads a split of the table with its name."""

    def __init__(self, files: TaskFiles, split: str = "test") -> None:
        self.split, self.rows = split, files.rows(load_tables()[self.name], split)


def read_rows(paths: Sequence[Path], columns: Sequence[str]) -> Rows:
    """Read the rows of `paths`, one file after the other.

    Raises:
        DataError: a file is broken or lacks one of `columns`; for JSON lines it names the line.
    """
    if all(path.suffix == ".parquet" for path in paths):
        return _read_parquet(paths, columns)
    rows = []
    for where, row in (line for path in paths for line in iter_rows(path)):
        _check_columns(where, row if isinstance(row, dict) else (), columns)
        for name in columns:
            if row[name] is None:
                raise DataError(_null(where, name))
        rows.append(row)
    return rows


def _null(where: str, column: str) -> str:
    return f"{where}: {column!r} is null: fill it in or remove that row"


def _check_columns(where: str, found: Collection[str], wanted: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in found]:
        raise DataError(
            f"{where} has no {' and no '.join(map(repr, missing))} (it has "
            f"{', '.join(found) or 'no columns'}): it is another data set"
        )


@dataclass(frozen=True)
class _ParquetRows:
    table: Any

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int, /) -> Row:
        row: Row = self.table.slice(index, 1).to_pylist()[0]
        return row


def _read_parquet(paths: Sequence[Path], columns: Sequence[str]) -> _ParquetRows:
    import pyarrow as pa  # imported here: training on text does not need it
    import pyarrow.parquet as pq

    tables = []
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                _check_columns(str(path), file.schema_arrow.names, columns)
                table = file.read(columns=list(columns))
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"cannot read {path} as Parquet ({reason}): delete it and run the same command "
                "again"
            ) from error
        for name in columns:
            if table.column(name).null_count:
                row = table.column(name).is_null().index(True).as_py() + 1
                raise DataError(_null(f"{path}, row {row}", name))
        tables.append(table)
    return _ParquetRows(pa.concat_tables(tables))
