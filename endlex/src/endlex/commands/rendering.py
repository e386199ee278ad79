"""Turn values into text for a terminal: tables, sizes, ages, numbers.

Names, notes and samples come from any program that logs: control characters, which could move the
cursor or retitle the window, are shown as escapes.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from endlex.client.transport import Retry
from endlex.protocol import EndlexError


def printable(value: Any) -> str:
    """Return the value's text with control characters escaped, on one line."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)
    )


def print_json(value: Any) -> None:
    """Print a value as indented JSON; control characters are escaped by the format itself."""
    print(json.dumps(value, indent=2, ensure_ascii=True))


def render_table(
    headers: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int] = ()
) -> str:
    """Return rows below headers, columns two spaces apart; those in `right` are aligned there."""
    texts = [[printable(cell) for cell in row] for row in [headers, *rows]]
    for number, column in enumerate(zip(*texts, strict=True)):
        align, width = str.rjust if number in right else str.ljust, max(map(len, column))
        for row in texts:
            row[number] = align(row[number], width)
    return "\n".join("  ".join(row).rstrip() for row in texts)


def format_bytes(count: int) -> str:
    """Return a size in binary units, such as 1.5 GiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_number(value: Any) -> str:
    """Return a number with six significant digits, whole ones with thousands separators."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool) or not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.6g}"


def format_age(moment: float | None) -> str:
    """Return how long ago a moment in Unix seconds was, such as "3 min ago"."""
    if not moment:
        return ""
    seconds = time.time() - moment
    for size, unit in ((86_400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "now" if seconds < 2 else f"{seconds:.0f} s ago"


def count(number: int, noun: str) -> str:
    """Return a number with its noun, as "1 file" or "2,000 files"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass
class ProgressLine:
    """One line that is rewritten on a terminal; on a pipe, a line at most every ten seconds.

    As a context manager it removes the line at the end, before something else is printed, and adds
    to a fault of the network how to resume; it may be entered again. `prefix` comes before all.
    """

    prefix: str = ""
    _last: float = 0.0
    _width: int = 0

    def show(self, what: str, done: int, total: int) -> None:
        """Show how many bytes of something are done."""
        now, is_terminal = time.monotonic(), sys.stderr.isatty()
        if now - self._last < (0.1 if is_terminal else 10.0):
            return
        self._last = now
        text = printable(f"{self.prefix}{what}: {format_bytes(done)} of {format_bytes(total)}")
        if is_terminal:
            print(f"\r{text.ljust(self._width)}", end="", file=sys.stderr, flush=True)
            self._width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._width:
            print(f"\r{' ' * self._width}\r", end="", file=sys.stderr, flush=True)
            self._width = 0
        if isinstance(error, Retry):
            raise EndlexError(f"{error}; run the same command to resume") from error
