"""Read people's own files: folders with splits, compressed text, JSON, CSV.

A byte order mark decides the encoding; without one it is UTF-8. Problems are reported to a `Refuse`
with their file and line.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from archerchat.errors import DataError, UsageError

Refuse = Callable[[str], None]
"""Receives a problem with a file or a line, which is left out if the function returns."""
Place = tuple[str, Any]
"""The place of a value, such as `talks.jsonl:12`, and the value."""
JSON_KINDS = (".jsonl", ".ndjson", ".json")
TABLE_KINDS = (".csv", ".tsv")
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CARDS = ("readme.md", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that describe a data set; in a folder with its rows they are not read."""
_UNDECODED = re.compile(r"[\udc80-\udcff]")
_SPLIT = re.compile(
    r"(?:.*[-_. ])??(train|validation|valid|val|dev|test)(?:[-_. ]\d.*)?", re.IGNORECASE
)


def refuse(problem: str) -> None:
    """Raise a DataError: the default for problems."""
    raise DataError(problem)


def _open_zstd(path: Path) -> Any:
    import pyarrow as pa  # imported here: chats and evaluations need no Arrow

    return pa.input_stream(str(path), compression="zstd")


_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}


def _split_name(path: Path) -> tuple[str, str]:
    """Return a file's name without suffixes, and its suffix without a compression's."""
    bare = Path(path.stem if path.suffix.lower() in _OPENERS else path.name)
    return bare.stem, bare.suffix.lower()


def file_kind(path: Path) -> str:
    """Return a file's suffix in lower case without a compression's: `.jsonl` of `A.JSONL.gz`."""
    return _split_name(path)[1]


@dataclass(frozen=True)
class Folder:
    """The readable files of a folder, sorted into splits by their names."""

    train: list[Path]
    held_out: list[Path]
    """Files named validation (or valid, val, dev), else test; empty if there is no train split."""
    left_out: list[str]
    """Descriptions of what is not read."""


def list_folder(source: Path, kinds: Collection[str]) -> Folder:
    """Sort the files of some `kinds` below `source` into splits by name, without hidden files.

    A `source` that is a file is always read. It is a UsageError if there is none.
    """
    if not source.exists():
        remedy = f"give a file or a folder of {', '.join(kinds)} files"
        raise UsageError(f"{source} does not exist: {remedy}")
    if not source.is_dir():
        return Folder([source], [], [])
    found = sorted(
        path
        for path in source.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(source).parts)
    )
    rows = {*JSON_KINDS, *TABLE_KINDS, ".parquet"}
    has_rows = any(file_kind(p) in rows and p.name.lower() not in CARDS for p in found)
    splits, others = defaultdict[str, list[Path]](list), defaultdict[str, list[Path]](list)
    for path in found:
        if file_kind(path) not in kinds:
            others[f"{path.suffix or 'no suffix'}, which is not read"].append(path)
        elif has_rows and path.name.lower() in CARDS:
            others["the data set's description"].append(path)
        else:
            splits[_find_split(path.relative_to(source))].append(path)
    held_out = (splits["validation"] or splits["test"]) if splits["train"] else []
    if held_out and splits["validation"] and splits["test"]:
        others["the test split"] = splits["test"]
    chosen = [splits["train"], splits[""]] if held_out else splits.values()
    train = sorted(path for paths in chosen for path in paths)
    left_out = [
        f"{len(paths):,} files ({why}), such as {paths[0].relative_to(source)}"
        if len(paths) > 1
        else f"{paths[0].relative_to(source)} ({why})"
        for why, paths in others.items()
    ]
    return Folder(train, held_out, left_out)


def _find_split(path: Path) -> str:
    """Return train, validation or test if the name of a file or a folder contains it, else ""."""
    for name in (_split_name(path)[0], *reversed(path.parts[:-1])):
        if match := _SPLIT.fullmatch(name):
            split = match[1].lower()
            return split if split in ("train", "test") else "validation"
    return ""


def iter_lines(
    path: Path, bad: Refuse = refuse, newline: str | None = None
) -> Iterator[tuple[str, str]]:
    """Yield each line of a text file, decompressed by its suffix, with its place, `name:number`."""
    opener: Any = _OPENERS.get(path.suffix.lower(), partial(open, mode="rb"))
    number = 0
    try:
        with io.BufferedReader(opener(path)) as file:
            start = file.peek(4)
            encoding = next((name for mark, name in MARKS if start.startswith(mark)), "utf-8")
            text = io.TextIOWrapper(file, encoding, "surrogateescape", newline)
            for number, line in enumerate(text, start=1):
                if _UNDECODED.search(line):
                    bad(f"{path}:{number}: not UTF-8 text: convert the file to UTF-8")
                else:
                    yield f"{path}:{number}", line
    except UnicodeError as error:
        bad(f"{path}:{number + 1}: not text ({error}): convert the file to UTF-8")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        bad(f"cannot read {path} ({reason}): check that the file is whole")


def iter_rows(path: Path, bad: Refuse = refuse) -> Iterator[Place]:
    """Yield each JSON value or row of a table with its place; blank lines are ignored.

    A `.json` file holds a list of values, one value, or one value per line.
    """
    kind = file_kind(path)
    if kind in TABLE_KINDS:
        yield from _iter_table(path, "\t" if kind == ".tsv" else ",", bad)
        return
    lines: Iterable[tuple[str, str]] = iter_lines(path, bad)
    if kind == ".json":
        lines = list(lines)
        try:
            value = json.loads("".join(line for _, line in lines))
        except (ValueError, RecursionError):
            pass  # one value per line
        else:
            items = value if isinstance(value, list) else [value]
            yield from ((f"{path}, item {i}", item) for i, item in enumerate(items, start=1))
            return
    for where, line in lines:
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                bad(f"{where}: not JSON ({error}): fix or remove that line")
                continue
            yield where, value


def _iter_table(path: Path, delimiter: str, bad: Refuse) -> Iterator[Place]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader((line for _, line in iter_lines(path, bad)), delimiter=delimiter)
    try:
        for row in reader:
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        bad(f"{path}:{reader.line_num}: not a table ({error}): fix that line")
