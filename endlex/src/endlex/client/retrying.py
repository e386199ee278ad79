"""Going on after faults of the network: how long to wait, how long at most, and work in threads."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from endlex.client.transport import Retry, Transport

T = TypeVar("T")

LONGEST_WAIT = 30.0
PATIENCE_SECONDS = 60.0
LEAST_ATTEMPTS = 3


class Backoff:
    """Waits that double from 0.2 s to 30 s, each shortened at random by up to a half."""

    def __init__(self, first: float = 0.2, longest: float = LONGEST_WAIT) -> None:
        self._first, self._longest = first, longest
        self._next = first

    def reset(self) -> None:
        """Start over: something worked."""
        self._next = self._first

    def wait(self, error: Retry) -> float:
        """Return the seconds to wait now; at least those that the server asked for."""
        seconds = self._next * random.uniform(0.5, 1.0)
        self._next = min(2 * self._next, self._longest)
        return max(seconds, error.retry_after or 0.0)


class Patience:
    """Try again after faults of the network, until nothing has got further for a while.

    The time counts from the first fault after progress, and a few attempts are made however long
    each one takes.
    """

    def __init__(self, seconds: float = PATIENCE_SECONDS) -> None:
        self._seconds = seconds
        self._progress: object = None
        self._start_over()

    def _start_over(self) -> None:
        self._backoff = Backoff(longest=5.0)
        self._deadline = math.inf
        self._faults = 0

    def progressed(self, *progress: object) -> None:
        """Note how far the work is; if that is not where it was, all patience is back."""
        if progress != self._progress:
            self._progress = progress
            self._start_over()

    def keep_trying(self, act: Callable[[], T]) -> T:
        """Return what `act` returns, after as many faults as there is patience for."""
        while True:
            try:
                return act()
            except Retry as error:
                seconds, now = self._backoff.wait(error), time.monotonic()
                self._deadline = min(self._deadline, now + self._seconds)
                self._faults += 1
                if self._faults >= LEAST_ATTEMPTS and now + seconds > self._deadline:
                    raise
                time.sleep(seconds)


def in_parallel(
    act: Callable[[T], None], items: Iterable[T], connections: int, transport: Transport
) -> None:
    """Act on each item, several at a time in threads; the first fault ends all, and is raised.

    Args:
        transport: what `act` asks; each thread's connection is closed at its end.
    """
    waiting, failed = deque(items), list[BaseException]()

    def work() -> None:
        try:
            while not failed:
                try:
                    item = waiting.popleft()
                except IndexError:  # nothing is left
                    return
                act(item)
        except BaseException as error:
            failed.append(error)
        finally:
            transport.close()

    with ThreadPoolExecutor(connections) as pool:
        try:
            for job in [pool.submit(work) for _ in range(min(connections, len(waiting)))]:
                job.result()
        except BaseException as error:  # such as Ctrl-C
            failed.append(error)
    if failed:
        raise next((error for error in failed if not isinstance(error, Retry)), failed[0])
