"""What a program prints, kept with its run: lines in chunks, as texts named `run/console`.

`write` of stdout and stderr is wrapped, on the objects that are there, so handlers that hold them
are heard too. A chunk is recorded when a line ends a second after the last one, when it is large,
and at the end of the run. What overwrites itself with carriage returns counts once, and terminal
colours are left out. A run keeps `MAX_CONSOLE_CHARS`, and after that its last lines.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from endlex.protocol import MAX_CONSOLE_CHARS

CHUNK_SECONDS = 1.0
CHUNK_CHARS = 8192
LINE_CHARS = 4000
"""Most of one line that are kept."""
LAST_LINES = 50
"""Kept when there was too much."""
ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])")


class Console:
    """Listen to stdout and stderr until closed.

    Args:
        record: called with each chunk of whole lines; its exceptions are ignored.
    """

    def __init__(self, record: Callable[[str], None]) -> None:
        self._record = record
        self._partial: dict[str, str] = {}
        self._lines: list[str] = []
        self._chars = self._kept = self._left_out = 0
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._flushed = time.monotonic()
        self._lock = threading.RLock()
        self._busy = False
        self._pid = os.getpid()
        self._streams = [
            (stream, _wrap(stream, partial(self._add, name)))
            for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr))
        ]

    def _add(self, stream: str, text: str) -> None:
        if os.getpid() != self._pid:  # a forked child's, and the lock may never be free there
            return
        with self._lock:
            if self._busy:  # recording printed something, or a signal handler did meanwhile
                return
            self._busy = True
            try:
                *whole, rest = (self._partial.get(stream, "") + text).split("\n")
                self._partial[stream] = rest.rpartition("\r")[2][-LINE_CHARS:] or rest[-LINE_CHARS:]
                for line in whole:
                    self._add_line(line.rstrip("\r").rpartition("\r")[2])
                if whole and time.monotonic() - self._flushed > CHUNK_SECONDS:
                    self._flush()
            finally:
                self._busy = False

    def _add_line(self, line: str) -> None:
        line = ESCAPES.sub("", line)[:LINE_CHARS]
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
            with contextlib.suppress(Exception):  # printing must work whatever is wrong here
                self._record("\n".join(lines))

    def close(self) -> None:
        """Stop listening, and record what is left."""
        for stream, wrapper in self._streams:
            if wrapper is not None and getattr(stream, "__dict__", {}).get("write") is wrapper:
                del stream.write  # else another wrapper is around this one, which hears on
        with self._lock:
            self._busy = True
            for line in filter(None, self._partial.values()):
                self._add_line(line.strip("\r").rpartition("\r")[2])
            if self._left_out:
                self._lines.append(f"... {self._left_out:,} lines left out ...")
            self._lines += self._last
            self._flush()


def _wrap(stream: Any, listen: Callable[[str], None]) -> Any:
    """Call `listen` with what is written; return None where the stream cannot be wrapped."""
    if not callable(write := getattr(stream, "write", None)):
        return None

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
