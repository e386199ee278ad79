"""What is said on stderr and stdout, so that saying it never stops anything."""

from __future__ import annotations

import contextlib
import io
import sys
from functools import cache


def warn(message: str) -> None:
    """Print a line, also in a signal handler, and where stderr is closed."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # RuntimeError: it was printing
        print(f"endlex: {message}", file=sys.stderr)


@cache
def warn_once(message: str) -> None:
    """Print a line, once per process."""
    warn(message)


def replace_unencodable() -> None:
    """Let stdout and stderr show another character for one that they cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
