"""Threads for everything that would hold up the event loop, in pools that cannot starve another.

Reading (queries, series), files (parts, downloads) and batches (parsing) have threads of their
own: a dozen uploads cannot keep a chart waiting. Writing to the database has its own thread, in
`database`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Workers:
    """The pools; each method runs a function in one and awaits its result."""

    def __init__(self) -> None:
        self._reads = ThreadPoolExecutor(4, "endlex-read")
        self._files = ThreadPoolExecutor(4, "endlex-file")
        self._batches = ThreadPoolExecutor(2, "endlex-batch")
        self._quick = ThreadPoolExecutor(1, "endlex-quick")

    async def read(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what reads the database."""
        return await _run(self._reads, lambda: function(*args, **kwargs))

    async def file(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what reads or writes files."""
        return await _run(self._files, lambda: function(*args, **kwargs))

    async def batch(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what decodes an incoming batch."""
        return await _run(self._batches, lambda: function(*args, **kwargs))

    async def quick(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what takes a millisecond at most, and must not wait behind a long read."""
        return await _run(self._quick, lambda: function(*args, **kwargs))

    def close(self) -> None:
        """Wait for what runs; what has not begun never will."""
        for pool in (self._reads, self._files, self._batches, self._quick):
            pool.shutdown(wait=True, cancel_futures=True)


async def _run(pool: ThreadPoolExecutor, function: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, function)
