"""The journal's one writer: a record is a line, and a line is one `os.write`.

Each recording process opens its own journal, one session, and holds its lock (`flock`) while it
lives, so that others see when it is gone. The file appears under its name with its lock held and
its first record written. There is no thread, no queue and no network here. The process may be
killed at any moment: what was written stays, and at most the last line is torn.

Before that come the functions that turn what a trainer gives into JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from endlex import protocol
from endlex.client.process import FULL, fsync, try_lock, warn_once
from endlex.protocol import MAX_BATCH_BYTES, EndlexError
from endlex.reading import session_files, session_number

LARGEST_EXACT = 2**53  # larger whole numbers are kept as floats, as every reader has them
DEEPEST = 50  # levels of nested values; what is deeper is kept as text


def tidy_name(name: Any, default: str) -> str:
    """Make a name printable and short: one that is too long is cut, and ends with a hash of it."""
    text = "".join(c if c.isprintable() else "_" for c in str(name)).strip()
    if len(text) > protocol.MAX_NAME_CHARS:
        import hashlib

        digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8]
        text = f"{text[: protocol.MAX_NAME_CHARS - 9]}~{digest}"
    return text or default


def as_number(value: Any) -> float:
    """Return the number that `value` is, or raise whatever some library's tensor raises."""
    if type(value) is float or (type(value) is int and abs(value) <= LARGEST_EXACT):
        return value
    if isinstance(value, str | bytes):
        raise TypeError("text")
    item = getattr(value, "item", None)  # of an array or tensor of one element, in any shape
    return float(item() if callable(item) else value)


def as_list(given: str | Iterable[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


class RunConfig(dict[str, Any]):
    """A run's configuration: calls `changed` when a key is set."""

    def __init__(self, content: Mapping[str, Any], changed: Callable[[], None]) -> None:
        super().__init__(content)
        self._changed = changed
        self._recorded = plain(content)

    def take_changes(self) -> dict[str, Any]:
        """Return what has changed since this was asked last."""
        before, self._recorded = self._recorded, plain(self)
        return {k: v for k, v in self._recorded.items() if k not in before or before[k] != v}

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._changed()

    def update(self, *others: Any, allow_val_change: bool = True, **more: Any) -> None:
        """Update the dictionary; wandb's `allow_val_change` makes no difference."""
        super().update(*(as_config(other) for other in others), **more)
        self._changed()

    def __ior__(self, other: Any) -> RunConfig:  # type: ignore[override, misc]
        self.update(other)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # a copy is another one's

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]


def as_config(given: Any) -> dict[Any, Any]:
    """Return a configuration in any usual shape as a dictionary: its own top level, unchanged."""
    members = {} if given is None else _members(given)
    return {"config": given} if members is None else members


def _members(value: Any) -> dict[Any, Any] | None:
    """Return what a mapping, a dataclass or a namespace holds; else None."""
    if isinstance(value, Mapping):
        return dict(value)
    fields = getattr(type(value), "__dataclass_fields__", None)  # importing dataclasses takes long
    if fields is not None:
        return {name: getattr(value, name) for name in fields}
    if type(value).__name__ in ("Namespace", "SimpleNamespace"):
        return dict(vars(value))
    return None


def _default(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    members = _members(value)
    return str(value) if members is None else members


ENCODER = json.JSONEncoder(
    allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_default
)


def plain(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Return `content` as JSON keeps it: non-finite floats and other objects as strings."""
    kept: dict[str, Any] = json.loads(to_json(content))
    return kept


def to_json(content: Mapping[Any, Any]) -> str:
    """Return `content` as JSON on one line, whatever it holds."""
    try:
        return ENCODER.encode(content)
    except (ValueError, TypeError, RecursionError):  # rare: only then is every value looked at
        return ENCODER.encode(_jsonable(content))


def _jsonable(value: Any, depth: int = 0) -> Any:
    if isinstance(value, float):
        return protocol.encode_number(value)
    if value is None or isinstance(value, str | int):
        return value
    if depth > DEEPEST:
        return f"{value!r:.200}"
    if isinstance(value, list | tuple):
        return [_jsonable(item, depth + 1) for item in value]
    if isinstance(value, Mapping):
        names = (str(key.value if isinstance(key, Enum) else key) for key in value)
        items = (_jsonable(item, depth + 1) for item in value.values())
        return dict(zip(names, items, strict=True))
    return _jsonable(_default(value), depth + 1)


LARGEST_BACKLOG = 16 * 2**20  # bytes of records held in memory while the disk refuses them

OPENED: weakref.WeakSet[Journal] = weakref.WeakSet()  # those that a forked child must abandon


class Journal:
    """Append records to a new file of a run's directory, as one session.

    A full disk does not stop the trainer at once: what could not be written is kept in memory,
    with one warning, and goes out before the next record. In a forked child the journal is shut:
    it belongs to the parent.

    Args:
        start: the first record, without `type`, `session`, `seq` and `time`.
        session: an id of an importer's, whose `moment` is the first record's time.
    """

    def __init__(
        self,
        directory: Path,
        start: Mapping[str, Any],
        *,
        session: str | None = None,
        moment: float | None = None,
    ) -> None:
        self.directory, folder = directory, directory / protocol.JOURNAL_DIR
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((session_number(path) for path in session_files(directory)), default=0)
        self.session = session or f"{number:06d}-{os.urandom(6).hex()}"
        self.path = folder / f"{self.session}.jsonl"
        self.number = session_number(self.path)
        self.inherited, self._backlog = False, b""
        self._numbers = itertools.count()
        self.lock = threading.RLock()
        """Held while a record is written. A signal handler may log in the middle of that."""
        self.count = 0  # how many records were appended
        hidden = folder / f".{self.session}.new"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        self._descriptor = os.open(hidden, flags, 0o644)
        try_lock(self._descriptor)
        self.append(protocol.SESSION, start, moment)
        hidden.rename(self.path)
        _watch_forks()
        OPENED.add(self)

    def append(self, kind: str, content: Mapping[str, Any], moment: float | None = None) -> None:
        """Write one record; when this returns, killing the process does not lose it.

        What JSON cannot hold is stored as its `str`, or as `protocol` says. The moment is in Unix
        seconds, by default now.

        Raises:
            EndlexError: the record is too large to be sent. Nothing is written.
            OSError: the disk has refused more than `LARGEST_BACKLOG` bytes; this record is lost.
        """
        self.append_members(kind, f",{to_json(content)[1:-1]}" if content else "", moment)

    def append_own(self, name: str, text: str, step: int | None = None) -> None:
        """Record a text of Endlex's own; its step is the session's number, if not given."""
        step = self.number if step is None else step
        self.append(protocol.TEXT, {"step": step, "name": name, "text": text})

    def append_members(self, kind: str, members: str, moment: float | None = None) -> None:
        """Do what `append` does for content that is already JSON: `,"key":value` for each."""
        if len(members) > MAX_BATCH_BYTES // 4:  # else it is short enough however it is encoded
            size = len(members.encode(errors="replace")) + 200  # of what is before them
            if size > MAX_BATCH_BYTES:
                limit = f"is larger than {MAX_BATCH_BYTES:,}: log less at once"
                raise EndlexError(f"a {kind} record of {size:,} bytes {limit}")
        if self.inherited:
            warn_once("this process was forked from the one that records: it records nothing")
            return
        with self.lock:
            number = next(self._numbers)
            moment = time.time() if moment is None else moment
            head = f'{{"type":"{kind}","session":"{self.session}","seq":{number}'
            line = f'{head},"time":{moment!r}{members}}}\n'
            self._write(line.encode(errors="replace"))
            self.count = max(self.count, number + 1)

    def _write(self, record: bytes) -> None:
        if self._descriptor < 0:
            return  # a signal handler finished the run in the middle of this
        waiting, self._backlog = self._backlog, b""
        content = waiting + record if waiting else record
        try:
            written = os.write(self._descriptor, content)
        except OSError as error:
            is_lost = len(content) > LARGEST_BACKLOG
            self._backlog = (waiting if is_lost else content) + self._backlog
            remedy = ": free some space" if error.errno in FULL else ""
            kept = "keeping records in memory and trying again with each new one"
            warn_once(f"cannot write {self.path} ({error.strerror}); {kept}{remedy}")
            if is_lost:
                raise
        else:
            self._backlog = content[written:] + self._backlog

    def close(self) -> None:
        """Put everything on the disk and close the file; a second call does nothing.

        Raises:
            OSError: records that the disk refused are lost.
        """
        with self.lock:
            if self._descriptor < 0:
                return
            descriptor, self._descriptor = self._descriptor, -1
            try:
                while self._backlog:
                    self._backlog = self._backlog[os.write(descriptor, self._backlog) :]
                fsync(descriptor)
            finally:
                os.close(descriptor)

    def abandon(self) -> None:
        """Give up the file in a forked child: the parent keeps it, and its lock."""
        self.lock = threading.RLock()  # a thread that no longer exists may have held the old one
        self.inherited, self._backlog = True, b""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@cache
def _watch_forks() -> None:
    def abandon_all() -> None:
        for journal in list(OPENED):
            journal.abandon()

    os.register_at_fork(after_in_child=abandon_all)
