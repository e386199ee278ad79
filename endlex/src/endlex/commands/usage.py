"""The error of a command that was called in a way that cannot work."""

from __future__ import annotations

from endlex.protocol import EndlexError


class UsageError(EndlexError):
    """Stop with a message and the exit status of wrong usage, as a parser would."""

    exit_status = 2
