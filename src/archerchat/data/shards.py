"""Text shards on disk: Parquet files with a column `text`, one document per row (SPEC section 4).

A data directory's shards are read in the order of their names, and the last one is for validation.
The row group is the unit of reading: one at a time is in memory, and each rank takes every W-th row
group of a shard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from archerchat.errors import DataError, UsageError
from archerchat.files import explained_writes, write_bytes
from archerchat.home import Home

TEXT_COLUMN = "text"
TEXT_TYPES = {"string", "large_string", "string_view", "binary", "large_binary", "binary_view"}
MAKE_DATA = "make some with `archerchat data download` or `archerchat data build stdlib`"
PUBLISHED = ("climbmix", "fineweb-edu", "stdlib")
"""Names that the commands of `MAKE_DATA` make."""


def data_directory(data: str, home: Home) -> Path:
    """Return the directory of `data`: a path, or the name of a source under the home.

    `./climbmix`, `~/climbmix`, `..` and `/x/climbmix` are paths; `climbmix` is always a name.
    A UsageError lists the known names if there is no such directory.
    """
    if "/" in data or data.startswith((".", "~")):
        with contextlib.suppress(RuntimeError):  # ~ and a user that does not exist
            if (path := Path(data).expanduser()).is_dir():
                return path
        raise UsageError(f"{data} is not a directory: give one that holds shards, or a name")
    if (directory := home.data_dir(data)).is_dir():
        return directory
    names = ", ".join(source.name for source in list_sources(home))
    known = f"; there is {names}. Choose one of them, or " if names else ": "
    own = (
        ""
        if data in PUBLISHED
        else (
            f"make it from your own text with `archerchat data build DIRECTORY --name {data}`, or "
        )
    )
    here = f". For the directory {data} that is here, write ./{data}" if Path(data).is_dir() else ""
    raise UsageError(f"no data {data!r} under {directory.parent}{known}{own}{MAKE_DATA}{here}")


def list_sources(home: Home) -> list[Path]:
    """Return the directories under the home that hold shards, by name."""
    shards = home.data_dir("any").parent.glob("*/*.parquet")
    return sorted({path.parent for path in shards if not path.parent.name.startswith(".")})


def list_shards(directory: Path) -> list[Path]:
    """Return the shards in `directory` by name, at least one; hidden files are ignored."""
    shards = sorted(p for p in directory.glob("*.parquet") if not p.name.startswith("."))
    if not shards:
        raise DataError(f"no *.parquet shard in {directory}: {MAKE_DATA}")
    return shards


def split_shards(shards: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the train shards and the last one by name, for validation; a DataError without two."""
    if len(shards) < 2:
        raise DataError(
            f"{shards[0].parent if shards else 'the list'} holds {len(shards)} shard; two are "
            f"needed, the last being validation: add another, or {MAKE_DATA}"
        )
    ordered = sorted(shards, key=lambda path: path.name)
    return ordered[:-1], ordered[-1:]


class Shard(contextlib.AbstractContextManager["Shard"]):
    """Read one Parquet file, a row group at a time; a context manager that closes it.

    Raises:
        DataError: the file is missing, cut short, corrupt, or has no such column of text or UTF-8.
    """

    def __init__(self, path: Path, column: str = TEXT_COLUMN) -> None:
        self.path, self._column = path, column
        with self._explained():
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            self._metadata, schema = self._file.metadata, self._file.schema_arrow
        self.num_row_groups: int = self._metadata.num_row_groups
        self.num_documents: int = self._metadata.num_rows
        if problem := _find_problem(schema, column):
            self.close()
            raise DataError(f"{path}{problem}")

    @property
    def documents_per_row_group(self) -> list[int]:
        return [self._metadata.row_group(i).num_rows for i in range(self.num_row_groups)]

    @property
    def text_bytes(self) -> int:
        """Approximate size of the uncompressed text; includes lengths and headers."""
        groups = map(self._metadata.row_group, range(self.num_row_groups))
        columns = (group.column(i) for group in groups for i in range(group.num_columns))
        return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == self._column)

    def read_row_group(self, index: int) -> list[str]:
        """Return the documents of one row group; a null is an empty document."""
        with self._explained():
            table = self._file.read_row_group(index, columns=[self._column], use_threads=False)
            values = table.column(0).to_pylist()
            return [v.decode() if isinstance(v, bytes) else v or "" for v in values]

    def close(self) -> None:
        self._file.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"cannot read {self.path} as Parquet ({reason}): delete it and download or build "
                f"it again"
            ) from error


def _find_problem(schema: pa.Schema, column: str) -> str | None:
    if column not in schema.names:
        return (
            f" has no column {column!r} (it has {', '.join(schema.names) or 'none'}): name the one "
            "that holds the documents, `archerchat data build DIRECTORY --text-column NAME`"
        )
    kind = schema.field(column).type
    if str(kind.value_type if pa.types.is_dictionary(kind) else kind) not in TEXT_TYPES:
        return f": column {column!r} holds {kind}: it must hold strings"
    return None


def iter_documents(shards: Sequence[Path], column: str = TEXT_COLUMN) -> Iterator[str]:
    """Iterate over the documents of `shards` in order, one row group in memory at a time."""
    for path in shards:
        with Shard(path, column) as shard:
            for index in range(shard.num_row_groups):
                yield from shard.read_row_group(index)


def write_shards(
    documents: Iterable[str],
    directory: Path,
    documents_per_row_group: int = 256,
    documents_per_shard: int = 8192,
    first_index: int = 0,
) -> list[Path]:
    """Write `documents` in order as `shard_00000.parquet` and so on, each atomically.

    One shard's documents are in memory at a time. A full disk is a DataError.
    """
    remaining = iter(documents)
    paths: list[Path] = []
    while texts := list(islice(remaining, documents_per_shard)):
        path = directory / f"shard_{first_index + len(paths):05d}.parquet"
        buffer = pa.BufferOutputStream()
        pq.write_table(
            pa.table({TEXT_COLUMN: pa.array(texts, pa.string())}),
            buffer,
            row_group_size=documents_per_row_group,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        with explained_writes(path):
            write_bytes(path, buffer.getvalue())
        paths.append(path)
    return paths
