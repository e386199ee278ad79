"""Write what an importer reads as a run directory: run.json and one session file a process.

The records keep the times of the tool that made them. A directory is built under a temporary name
and renamed when it is whole. A run's id comes from the source, and a session's from its first
records: a source that has grown since continues its session, and several sources of one run are
several sessions of it. One call of another tool's `log` is written from a JSON object by name, as
wandb and trackio keep it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from endlex import protocol
from endlex.client.directories import claim_directory, register, session_start
from endlex.client.journal import Journal, as_number, tidy_name, to_json
from endlex.client.log import HISTOGRAM, keep_media, read_file
from endlex.client.shipper.send_journals import renew_session
from endlex.protocol import NON_FINITE, SYSTEM, TRAINER, EndlexError, Status, encode_number
from endlex.reading import session_files

LARGEST_FILE = 64 * 2**20

Moment = tuple[int, float]
"""A step, and its time in Unix seconds."""


@dataclass
class RunWriter:
    """Build `root/<project>/<name>-<run id>`; as a context manager it appears whole, or not at all.

    If the run is there already, its new sessions, and what grown ones have more, join it.
    """

    root: Path
    tool: str
    """Such as "wandb": becomes a tag."""
    identity: str
    """What makes the run itself: equal for every import of it."""
    project: str
    name: str
    created: float
    """Unix seconds."""
    config: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()
    group: str | None = None
    notes: str | None = None
    host: str = ""
    run: str = ""
    """The run's id: the tool's own if it may be one here, else made from the identity."""
    ended: Status = "finished"
    """How it ended if it does not say: it may grow, so this is no record at its end."""
    counts: Counter[str] = field(default_factory=Counter, init=False)
    """Records written, by type."""
    skipped: Counter[str] = field(default_factory=Counter, init=False)
    """What was left out, by reason."""
    _journals: dict[str, Journal] = field(default_factory=dict, init=False)
    """By kind of session."""

    def __post_init__(self) -> None:
        self.project, self.name = tidy_name(self.project, self.tool), tidy_name(self.name, "run")
        self.tags = [tidy_name(tag, "tag") for tag in self.tags]
        if not protocol.RUN_ID.fullmatch(self.run):
            self.run = hashlib.sha256(f"{self.tool}\0{self.identity}".encode()).hexdigest()[:10]
        project, name = (
            re.sub(r"[^\w.-]+", "_", part).strip(".")[:80] for part in (self.project, self.name)
        )
        folder = self.root / project
        self.directory = next(folder.glob(f"*-{self.run}"), folder / f"{name}-{self.run}")
        building = f".{self.directory.name}.importing-{os.urandom(4).hex()}"
        self._building = self.directory.with_name(building)

    def __enter__(self) -> RunWriter:
        owner = (self.run, self.project, self.name, self.created)
        self._owner = claim_directory(self._building, *owner)
        return self

    def _begin(self, kind: str, first: Mapping[str, Any]) -> None:
        """Open a session file, unless it is open; `first` follows its session record."""
        if kind in self._journals:
            return
        if kind != TRAINER:
            self._begin(TRAINER, {})
        content = session_start(
            self._owner,
            kind,
            config=self.config if kind == TRAINER else {},
            tags=sorted({*self.tags, f"imported:{self.tool}"}),
            group=self.group,
            notes=self.notes,
        )
        content |= {"host": self.host, "pid": 0, "ended": self.ended}
        del content["process"]  # which is this one, and not what recorded
        digest = hashlib.sha256(to_json({"session": content, "first": first}).encode()).hexdigest()
        # Sessions are read in the order of their ids: by their beginnings, the trainer's first.
        session = f"{max(int(self.created), 1):06d}-{int(kind == SYSTEM)}{digest[:11]}"
        journal = Journal(self._building, content, session=session, moment=self.created)
        self._journals[kind] = journal

    def append(
        self, record: str, time: float, content: Mapping[str, Any], kind: str = TRAINER
    ) -> None:
        """Write a record of a type to the session of a kind, or count why that cannot be."""
        if not 0 <= content.get("step", 0) <= protocol.MAX_STEP:
            self.skip("step below 0 or above 2**62")
            return
        self._begin(kind, {"time": time, **content})
        try:
            self._journals[kind].append(record, content, time)
            self.counts[record] += 1
        except EndlexError:
            self.skip("record that is too large to be sent")

    def metrics(self, at: Moment, values: Mapping[str, float], kind: str = TRAINER) -> None:
        encoded = {tidy_name(n, "metric"): encode_number(_number(v)) for n, v in values.items()}
        if encoded:
            self.append(protocol.METRICS, at[1], {"step": at[0], "values": encoded}, kind)

    def _named(self, record: str, at: Moment, name: str, **content: Any) -> None:
        self.append(record, at[1], {"step": at[0], "name": tidy_name(name, record), **content})

    def text(self, at: Moment, name: str, text: str) -> None:
        """Record a text; one that is too long is cut."""
        if len(text) > protocol.MAX_TEXT_CHARS:
            self.skip("end of a text that is too long")
        self._named(protocol.TEXT, at, name, text=text[: protocol.MAX_TEXT_CHARS])

    def table(self, at: Moment, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        self._named(protocol.TABLE, at, name, columns=columns, rows=rows)

    def histogram(
        self, at: Moment, name: str, edges: Sequence[float], counts: Sequence[float]
    ) -> None:
        """Record a histogram by the edges of its bins and the counts between them."""
        bins = zip(edges, edges[1:], counts, strict=False)
        self.table(at, name, HISTOGRAM, list(map(list, bins)))

    def media(
        self, at: Moment, name: str, content: bytes, mime: str, caption: str | None = None
    ) -> None:
        """Record a picture, a sound or another file."""
        kept = keep_media(self._building, content, mime, caption)
        self._named(protocol.MEDIA, at, name, **kept)

    def log(self, at: Moment, row: Mapping[str, Any], files: Path) -> None:
        """Record one call of another tool's `log`; the paths of files are below `files`.

        Numbers are recorded together; texts, tables, histograms and media one by one.
        """
        self.metrics(at, numbers_of(row))
        for name, value in flatten(row).items():
            if isinstance(value, Mapping):
                self._log_typed(at, name, value, files)
            elif value is None or is_number(value):
                continue
            elif isinstance(value, str):
                self.text(at, name, value)
            else:
                self.skip(f"value of type {type(value).__name__}")

    def _log_typed(self, at: Moment, name: str, value: Mapping[str, Any], files: Path) -> None:
        kind = str(value["_type"]).removeprefix("trackio.")
        path = str(value.get("path") or value.get("file_path") or "")
        if kind == "histogram" and isinstance(value.get("bins"), list):
            self.histogram(at, name, value["bins"], value.get("values") or [])
        elif "table" in kind:
            try:
                table = _table_of(value, inside(files, path))
            except (ValueError, KeyError, TypeError, AttributeError):
                self.skip(kind)
            else:
                self.table(at, name, *table)
        else:
            caption = str(value.get("caption") or "") or None
            for one in value.get("filenames") or [path]:
                if found := inside(files, str(one)):
                    self.media(at, name, *read_file(found), caption)
                else:
                    self.skip(kind)

    def finish(self, time: float, status: Status) -> None:
        """Record the end of the run, in every session that it has: nothing may follow."""
        self._begin(TRAINER, {})
        for kind in self._journals:
            self.append(protocol.FINISH, time, {"status": status}, kind)

    def skip(self, reason: str) -> None:
        """Count something that has no place in a journal."""
        self.skipped[reason] += 1

    def __exit__(self, failure: object, *_: object) -> None:
        if failure is None:
            self._begin(TRAINER, {})
        for journal in self._journals.values():
            journal.close()
        if failure is None:
            self._publish()
            register(self.directory)
        shutil.rmtree(self._building, ignore_errors=True)

    def _publish(self) -> None:
        final = self.directory
        if not final.exists():
            self._building.rename(final)
            return
        for path in (self._building / protocol.MEDIA_DIR).glob("*"):
            (final / protocol.MEDIA_DIR).mkdir(exist_ok=True)
            path.replace(final / protocol.MEDIA_DIR / path.name)
        for path in session_files(self._building):
            there = final / protocol.JOURNAL_DIR / path.name
            old, new = there.read_bytes() if there.exists() else b"", path.read_bytes()
            if old.startswith(new):
                continue  # the same, or a shorter copy of the source
            if not new.startswith(old):  # not grown but changed: what was sent of it stays there
                there.unlink()
                path = renew_session(path)
            path.replace(final / protocol.JOURNAL_DIR / path.name)


FoundRuns = list[tuple[Path, Callable[[], RunWriter | list[RunWriter]]]]
"""What `endlex import` finds: the places of runs, each with what imports it."""


def _number(value: float) -> float:
    """Make a truth value 0 or 1, and an integer beyond every float an infinity."""
    try:
        return as_number(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def load(module: str) -> Any:
    """Return a module of a tool's own library; an `EndlexError` if it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise EndlexError(
            f"this needs {module.partition('.')[0]}'s own library, to read its files: "
            "pip install 'endlex[import]'"
        ) from error


def find_files(path: Path, pattern: str, what: str) -> list[Path]:
    """Return the one file that is named, or those below a directory, or raise an `EndlexError`."""
    found = [path] if path.is_file() else [p for p in path.rglob(pattern) if p.is_file()]
    if not found:
        raise EndlexError(f"{path} holds no {what}")
    return sorted(found)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Join the keys of nested mappings with "/"; what has a `_type` stays whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and "_type" not in value:
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def numbers_of(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers among nested values, by their joined names."""
    flat = flatten(values, prefix).items()
    return {k: NON_FINITE[v] if isinstance(v, str) else v for k, v in flat if is_number(v)}


def is_number(value: Any) -> bool:
    """Whether `value` is a number, or the word for one that JSON lacks."""
    return value in NON_FINITE if isinstance(value, str) else isinstance(value, int | float)


def inside(files: Path, relative: str) -> Path | None:
    """A file's path; None where there is none, it is too large, or it leads out of the run."""
    with suppress(OSError, ValueError):  # no file can have such a name
        target = (files / relative).resolve()
        if target.is_relative_to(files.resolve()) and target.is_file():
            return target if target.stat().st_size <= LARGEST_FILE else None
    return None


def _table_of(value: Mapping[str, Any], file: Path | None) -> tuple[list[str], list[list[Any]]]:
    records = value.get("_value")
    if isinstance(records, list):  # trackio's: a list of objects
        columns = list(dict.fromkeys(key for record in records for key in record))
        return columns, [[record.get(column) for column in columns] for record in records]
    table = json.loads(file.read_bytes() if file else b"")
    return [str(column) for column in table["columns"]], [list(row) for row in table["data"]]
