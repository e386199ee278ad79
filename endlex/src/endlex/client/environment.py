"""What a run was, what it printed and how it ended, recorded as texts under Endlex's own names.

What it was: commit, uncommitted changes, command, versions, machine. What cannot be found out is
left out. Only the changes need a process, `git diff`, for a few milliseconds.

What it printed: `write` of stdout and stderr is wrapped, on the objects that are there, so handlers
that hold them are heard too. A chunk of lines is recorded when a line ends a second after the last
chunk, when it is large, and at the end of the run. What overwrites itself with carriage returns
counts once, and terminal colours are left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from endlex import protocol
from endlex.client.journal import Journal
from endlex.client.process import describe_error
from endlex.protocol import MAX_CONSOLE_CHARS, MAX_TEXT_CHARS

GIT_SECONDS = 5.0
COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
CHUNK_SECONDS = 1.0
CHUNK_CHARS = 8192
LINE_CHARS = 4000  # most of one line that are kept
LAST_LINES = 50  # kept when there was too much
ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])")
CHUNKS_PER_SESSION = 1_000_000


def record_environment(journal: Journal, code: bool) -> None:
    """Record what the run is, with `code` also its git checkout's uncommitted changes."""
    journal.append_own(protocol.ENVIRONMENT, json.dumps(describe_environment(), indent=1))
    if code and (changes := uncommitted_changes()):
        journal.append_own(protocol.CHANGES, changes)
    journal.append_own(protocol.PACKAGES, installed_packages())


def record_end(journal: Journal, status: protocol.Status, error: BaseException | None) -> None:
    """Record how the run ended, and close its journal."""
    end = {"status": str(status)}
    if error is not None and status != "finished":
        end["reason"] = describe_error(error)[: protocol.MAX_REASON_CHARS]
        if not isinstance(error, SystemExit):
            lines = "".join(traceback.format_exception(error))[-MAX_TEXT_CHARS:]
            journal.append_own(protocol.EXCEPTION, lines)
    journal.append(protocol.FINISH, end)
    journal.close()
    journal.path.with_suffix(".fault").unlink(missing_ok=True)


def describe_environment(place: Path | str | None = None) -> dict[str, Any]:
    """Return what there is to know of this process: command, commit, versions, machine.

    `place` is in the git checkout that counts, by default the program's or the working directory's.
    """
    root = _checkout(place)
    found = {
        "command": shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]]),
        "program": sys.argv[0],
        "directory": str(Path.cwd()),
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "host": platform.node(),
        "cpus": os.cpu_count(),
    }
    if root is not None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            commit, found["branch"] = _head(root / ".git")
            found["commit"] = commit if COMMIT.fullmatch(commit or "") else None
    return found


def _head(git: Path) -> tuple[str | None, str | None]:
    """Return commit and branch from git's own files: no process is started for it."""
    if git.is_file():  # of a worktree
        git = (git.parent / git.read_text().removeprefix("gitdir:").strip()).resolve()
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref:"):
        return head, None
    name, shared = head.removeprefix("ref:").strip(), git / "commondir"
    branch = name.removeprefix("refs/heads/")
    common = (git / shared.read_text().strip()) if shared.is_file() else git
    for place in (git / name, common / name):
        if place.is_file():
            return place.read_text().strip(), branch
    packed = common / "packed-refs"
    lines = packed.read_text().splitlines() if packed.is_file() else []
    found = (line.removesuffix(f" {name}") for line in lines if line.endswith(f" {name}"))
    return next(found, None), branch


def uncommitted_changes(place: Path | str | None = None) -> str:
    """Return the checkout's `git diff HEAD`; empty outside one, cut where it is very long."""
    import subprocess  # takes longer to import than the rest of the client

    root = _checkout(place)
    if root is None:
        return ""
    try:
        changes = subprocess.check_output(
            ["git", "-C", str(root), "diff", "HEAD", "--no-color", "--no-ext-diff"],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=GIT_SECONDS,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return changes.decode(errors="replace")[:MAX_TEXT_CHARS]


def installed_packages() -> str:
    """Return `name==version` of each package that can be imported here, one per line, sorted."""
    found = set[str]()
    for entry in sys.path:  # by the directories' names: reading every package takes long
        with contextlib.suppress(OSError):
            for path in Path(entry or ".").iterdir():
                package, dash, version = path.stem.partition("-")
                if dash and path.suffix in (".dist-info", ".egg-info"):
                    found.add(f"{package.replace('_', '-')}=={version}")
    return "\n".join(sorted(found, key=str.lower))


def _checkout(place: Path | str | None) -> Path | None:
    starts = [Path.cwd()] if place is None else [Path(place)]
    if place is None and sys.argv and sys.argv[0] not in ("", "-c"):
        starts.insert(0, Path(sys.argv[0]).parent)
    around = ((start, *start.parents) for start in map(Path.resolve, starts))
    return next((place for place in chain(*around) if (place / ".git").exists()), None)


class Console:
    """Record what stdout and stderr are given, in chunks of whole lines, until closed."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.chunks = 0  # how many were recorded
        self._partial, self._lines = dict[str, str](), list[str]()
        self._chars = self._kept = self._left_out = 0
        self._last = deque[str](maxlen=LAST_LINES)
        self._flushed = time.monotonic()
        self._lock = threading.RLock()
        self._busy = False
        self._streams = [
            (stream, _wrap(stream, partial(self._add, name)))
            for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr))
        ]

    def _add(self, stream: str, text: str) -> None:
        if self._journal.inherited:  # in a forked child, where the lock may never be free
            return
        with self._lock:
            if self._busy:  # recording printed something, or a signal handler did meanwhile
                return
            self._busy = True
            try:
                *whole, rest = (self._partial.get(stream, "") + text).split("\n")
                self._partial[stream] = rest.rpartition("\r")[2][-LINE_CHARS:] or rest[-LINE_CHARS:]
                for line in whole:
                    self._add_line(line)
                if whole and time.monotonic() - self._flushed > CHUNK_SECONDS:
                    self._flush()
            finally:
                self._busy = False

    def _add_line(self, line: str) -> None:
        line = ESCAPES.sub("", line.rstrip("\r").rpartition("\r")[2])[:LINE_CHARS]
        if self._kept > MAX_CONSOLE_CHARS:
            self._left_out += len(self._last) == LAST_LINES
            self._last.append(line)
            return
        self._lines.append(line)
        self._chars += len(line)
        self._kept += len(line) + 1
        if self._chars > CHUNK_CHARS:
            self._flush()

    def _flush(self) -> None:
        lines, self._lines, self._chars = self._lines, [], 0
        self._flushed = time.monotonic()
        if lines:
            number, self.chunks = self.chunks, self.chunks + 1
            step = self._journal.number * CHUNKS_PER_SESSION + number
            with contextlib.suppress(Exception):  # printing must work whatever is wrong here
                self._journal.append_own(protocol.CONSOLE, "\n".join(lines), step)

    def close(self) -> None:
        """Stop listening, and record what is left."""
        for stream, wrapper in self._streams:
            if wrapper is not None and getattr(stream, "__dict__", {}).get("write") is wrapper:
                del stream.write  # else another wrapper is around this one, which hears on
        with self._lock:
            self._busy = True
            for line in filter(None, self._partial.values()):
                self._add_line(line)
            if self._left_out:
                self._lines.append(f"... {self._left_out:,} lines left out ...")
            self._lines += self._last
            self._flush()


def _wrap(stream: Any, listen: Callable[[str], None]) -> Any:
    """Call `listen` with what is written; return None where the stream cannot be wrapped."""
    write: Any = getattr(stream, "write", None)

    def tell(text: Any) -> Any:
        written = write(text)
        if isinstance(text, str):
            listen(text)
        return written

    try:
        stream.write = tell
    except (AttributeError, TypeError):
        return None
    return tell
