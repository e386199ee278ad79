"""Read documents from any folder of Parquet, JSONL or text files.

Parquet and JSONL files hold a document a row (`text`); `.txt` and `.md` files hold running text,
which is cut at paragraphs into documents of a useful size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from archerchat.data.shards import TEXT_COLUMN, iter_documents
from archerchat.errors import DataError

MAX_CHARACTERS = 10_000
"""Longer text is cut; the tokenizer's training reads no more of a document either."""


def list_files(source: Path) -> list[Path]:
    """Return the files below `source`, or `source`, that can be read, at least one, by path."""
    found = source.rglob("*") if source.is_dir() else [source]
    files = sorted(
        path
        for path in found
        if path.suffix.lower() in _READERS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
    )
    if not files:
        raise DataError(
            f"nothing to read in {source}: it needs {', '.join(_READERS)} files"
            if source.exists()
            else f"{source} does not exist: give a folder of {', '.join(_READERS)} files"
        )
    return files


def describe_files(source: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Return a JSON value that changes when a file is added, removed or written to."""
    described = [
        [path.relative_to(source).as_posix(), path.stat().st_size, path.stat().st_mtime_ns]
        for path in files
    ]
    return {"folder": str(source.resolve()), "files": described}


def iter_files(files: Sequence[Path]) -> Iterator[str]:
    """Iterate over the documents of `files` in order.

    Raises:
        DataError: a file, or a line of a JSONL file, is broken; the message names it.
    """
    for path in files:
        try:
            yield from _READERS[path.suffix.lower()](path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def split_text(text: str, max_characters: int = MAX_CHARACTERS) -> Iterator[str]:
    """Cut `text` into pieces of at most `max_characters`, which joined give it back.

    A cut falls at the widest break in the second half of a piece: two blank lines (before a
    function or a section), else a blank line, else a line's end, else anywhere.
    """
    start = 0
    while len(text) - start > max_characters:
        limit = start + max_characters
        for separator in ("\n\n\n", "\n\n", "\n"):
            found = text.rfind(separator, start + max_characters // 2, limit)
            if found >= 0:
                limit = found + len(separator)
                break
        yield text[start:limit]
        start = limit
    yield text[start:]


def _iter_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not JSON ({error}): fix that line") from error
            if not isinstance(row, dict) or not isinstance(row.get(TEXT_COLUMN), str):
                raise DataError(
                    f"{path}:{number}: each line must be an object with a string "
                    f"{TEXT_COLUMN!r}: fix that line"
                )
            yield row[TEXT_COLUMN]


def _iter_text(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}): convert or remove it") from error
    yield from split_text(text)


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".parquet": lambda path: iter_documents([path]),
    ".jsonl": _iter_jsonl,
    ".txt": _iter_text,
    ".md": _iter_text,
}
