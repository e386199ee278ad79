"""The API's error answers."""

from __future__ import annotations

import errno
from typing import Any


class ApiError(Exception):
    """An answer other than 2xx: `{"error": message, **extra}`, such as `extra` with an `offset`.

    The message names the value and the remedy.
    """

    def __init__(
        self, status: int, message: str, headers: dict[str, str] | None = None, **extra: Any
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body: dict[str, Any] = {"error": message, **extra}


def disk_full() -> ApiError:
    """Return the answer to a write that the disk has no room for."""
    message = "the server's disk is full: free some space there (endlex prune); nothing is lost"
    return ApiError(507, message, {"Retry-After": "30"})


def is_disk_full(error: BaseException) -> bool:
    """Whether an OSError or a database error says that there is no room."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "sqlite_errorname", "") == "SQLITE_FULL" or "is full" in str(error)
