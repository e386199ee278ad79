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
    """The pools: each attribute runs a function in one and awaits its result."""

    def __init__(self) -> None:
        self.read = Pool(4, "endlex-read")
        """Runs reads of the database."""
        self.file = Pool(4, "endlex-file")
        """Runs reads and writes of files."""
        self.batch = Pool(2, "endlex-batch")
        """Decodes incoming batches."""
        self.quick = Pool(1, "endlex-quick")
        """Answers questions of a millisecond at most, which must not wait behind a long read."""

    def close(self) -> None:
        """Wait for what runs, and drop what has not begun."""
        for pool in (self.read, self.file, self.batch, self.quick):
            pool.shutdown(wait=True, cancel_futures=True)


class Pool(ThreadPoolExecutor):
    """Some threads; calling it runs a function in one of them."""

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.wrap_future(self.submit(function, *args, **kwargs))
