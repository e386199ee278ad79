"""Read documents from any folder of Parquet, JSON, CSV or text files, compressed or not.

Each row holds a document, in the column or key `text` or in another given one. `.txt` and `.md`
files are cut at paragraphs into documents of a useful size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archerchat.data.shards import TEXT_COLUMN, iter_documents
from archerchat.errors import DataError
from archerchat.tasks.conversation import find_layout
from archerchat.text_files import (
    JSON_KINDS,
    TABLE_KINDS,
    Folder,
    file_kind,
    iter_lines,
    iter_rows,
    list_folder,
)

MAX_CHARACTERS = 10_000
"""Longer text is cut. The tokenizer's training reads no more of a document either."""
MAX_NAMED = 10
"""Number of problems that are listed."""
KINDS = (".parquet", *JSON_KINDS, *TABLE_KINDS, ".txt", ".md")


@dataclass
class Reading:
    """Read files, and count what was left out or cut."""

    column: str = TEXT_COLUMN
    skip_bad: bool = False
    num_bad: int = 0
    num_empty: int = 0
    num_long: int = 0
    num_pieces: int = 0
    bad: list[str] = field(default_factory=list)
    """The first problems of `num_bad`."""
    first_empty: str = ""

    def iter_texts(self, files: Sequence[Path]) -> Iterator[str]:
        """Iterate over the documents of `files` in order, without null and blank ones.

        A broken file or row is a DataError, unless `skip_bad`.
        """
        for path in files:
            for where, text in self._iter_file(path):
                if not text or text.isspace():
                    self.num_empty += 1
                    self.first_empty = self.first_empty or where
                else:
                    yield text

    def _refuse(self, problem: str) -> None:
        if not self.skip_bad:
            raise DataError(f"{problem}; --skip-bad leaves out what is bad")
        self.num_bad += 1
        if len(self.bad) < MAX_NAMED:
            self.bad.append(problem)

    def describe(self) -> list[str]:
        """Describe what was left out or cut, one sentence per kind."""
        lines = []
        if self.num_long:
            lines.append(
                f"{self.num_long:,} texts of more than {MAX_CHARACTERS:,} characters were cut at "
                f"paragraphs into {self.num_pieces:,} documents"
            )
        if self.num_empty:
            lines.append(
                f"{self.num_empty:,} null or blank texts were left out, the first: "
                f"{self.first_empty}"
            )
        if self.num_bad:
            lines += [f"{self.num_bad:,} bad files or rows were left out:", *self.bad]
            lines += ["..."] if self.num_bad > len(self.bad) else []
        return lines

    def _iter_file(self, path: Path) -> Iterator[tuple[str, str | None]]:
        """Yield each text with its place."""
        kind = file_kind(path)
        if kind == ".parquet":
            try:
                for number, text in enumerate(iter_documents([path], self.column), start=1):
                    yield f"{path}, row {number}", text
            except DataError as error:
                self._refuse(str(error))
        elif kind in (*JSON_KINDS, *TABLE_KINDS):
            for where, row in iter_rows(path, self._refuse):
                columns = row if isinstance(row, dict) else {}
                value = columns.get(self.column, row)
                if value is None or isinstance(value, str):
                    yield where, value
                else:
                    remedy = "fix it, or give --text-column"
                    if "messages" in columns or find_layout(columns) != "OpenAI":
                        remedy = "train on conversations with `archerchat sft --jsonl FILE`"
                    self._refuse(
                        f"{where}: no text in {self.column!r} (it has "
                        f"{', '.join(map(str, columns)) or 'nothing'}): {remedy}"
                    )
        else:
            pieces = list(split_text("".join(line for _, line in iter_lines(path, self._refuse))))
            if len(pieces) > 1:
                self.num_long += 1
                self.num_pieces += len(pieces)
            yield from ((str(path), piece) for piece in pieces)


def list_files(source: Path) -> Folder:
    """Return the readable files below `source`, at least one, or `source` itself if it is one."""
    folder = list_folder(source, KINDS)
    if not folder.train:
        raise DataError(f"nothing to read in {source}: give a folder of {', '.join(KINDS)} files")
    return folder


def describe_files(source: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Return a JSON value that changes when a file is added, removed or written to."""
    facts = ((path.relative_to(source).as_posix(), path.stat()) for path in files)
    described = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in facts]
    return {"folder": str(source.resolve()), "files": described}


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
