"""Errors for ArcherChat's users: one base, one exit code per class.

A message names the offending value and says what to do next; the command line prints it without a
traceback. Broken invariants are `assert`s instead. Limits of flags are in `config`.
"""


class ArcherChatError(Exception):
    """Stop with a message for the user; `exit_code` is the process's."""

    exit_code = 1


class UsageError(ArcherChatError):
    """Report a wrong or contradictory argument, or a name that does not exist."""

    exit_code = 2


class DataError(ArcherChatError):
    """Report missing, broken or insufficient training data."""


class TokenizerError(ArcherChatError):
    """Report a tokenizer that is missing, broken, or does not fit its model."""


class CheckpointError(ArcherChatError):
    """Report a checkpoint that cannot be read, written or resumed from."""


class MemoryExceededError(ArcherChatError):
    """The device ran out of memory."""
