"""What the client says in the trainer's process: a line on stderr, which never raises."""

from __future__ import annotations

import contextlib
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
