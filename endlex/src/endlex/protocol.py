"""Names, limits and record types: what every part of Endlex agrees on.

A run's journal is a file of JSON lines. Each record is one object with `type`, `session` (the id
of the process that wrote it), `seq` (0, 1, 2, ... within the session) and `time` (Unix seconds);
the other keys depend on the type:

    session  protocol, project, name, config, host, pid      first of every session
    metrics  step, values {name: number}
    text     step, name, text
    finish   status

JSON has no NaN and no infinities: in `values` and in `config` they are the strings "NaN",
"Infinity" and "-Infinity". A number in `values` is never a string otherwise, so reading it back
is not ambiguous; in `config` they stay strings.
"""

from __future__ import annotations

import math

PROTOCOL = 1
JOURNAL_FILE = "journal.jsonl"

SESSION = "session"
METRICS = "metrics"
TEXT = "text"
FINISH = "finish"

MAX_NAME_CHARS = 200
"""Of a project's, run's or metric's name."""
MAX_TEXT_CHARS = 1_000_000
"""Of one logged text."""

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class EndlexError(Exception):
    """Stop with a message for the user: a wrong name or value, or a damaged journal."""


def check_name(name: str, what: str) -> str:
    """Return `name` if it may name a project, a run or a metric.

    Raises:
        EndlexError: it is empty, too long, or holds control characters.
    """
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise EndlexError(f"{what} {name!r} must be printable text on one line, and not empty")
    if len(name) > MAX_NAME_CHARS:
        raise EndlexError(f"{what} {name[:40]!r}... is longer than {MAX_NAME_CHARS} characters")
    return name


def encode_number(value: float) -> float | str:
    """Return what stands for `value` in JSON."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def decode_number(value: float | str) -> float:
    """Undo `encode_number`.

    Raises:
        EndlexError: a string that stands for no number.
    """
    if not isinstance(value, str):
        return value
    if value not in NON_FINITE:
        raise EndlexError(f"{value!r} is not a number, nor one of {', '.join(NON_FINITE)}")
    return NON_FINITE[value]
