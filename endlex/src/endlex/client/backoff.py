"""How long to wait before the next try, after a fault that `transport` calls a `Retry`."""

from __future__ import annotations

import random

from endlex.client.transport import Retry, TransportError

LONGEST_WAIT = 30.0


class Backoff:
    """Waits that double from 0.2 s to 30 s, each shortened at random by up to a half."""

    def __init__(self, first: float = 0.2, longest: float = LONGEST_WAIT) -> None:
        self._first, self._longest = first, longest
        self._next = first

    def reset(self) -> None:
        """Start over: something worked."""
        self._next = self._first

    def wait(self, error: TransportError | None = None) -> float:
        """Seconds to wait now; at least those that the server asked for."""
        seconds = self._next * random.uniform(0.5, 1.0)
        self._next = min(2 * self._next, self._longest)
        asked = error.retry_after if isinstance(error, Retry) else None
        return max(seconds, asked or 0.0)
