"""What ArcherChat raises for its users: one base, one exit code a class.

A message names the offending value and says what to do next; the command line
prints it without a traceback. Broken invariants are `assert`s, not these. The checks of flags
that many commands have are here too.
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


def require_positive(config: object, *names: str) -> None:
    """Refuse fields of a command's configuration that are below 1; None is not given.

    Raises:
        UsageError: one is; the message names its flag.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def require_seed(seed: int) -> None:
    """Refuse a `--seed` that random generators do not take.

    Raises:
        UsageError: it is out of range.
    """
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed is {seed}; it must be from 0 to 2**63 - 1")
