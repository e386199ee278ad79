"""Events for pages that watch: at most two messages per second, run and reader.

A reader has a small table of what is new, not a queue: news of one run and kind are merged into
one entry, so a burst of ten thousand records is one message, and a reader that stands still holds
no more memory than one that reads. One that has too much that is new is dropped, and its browser
connects again. All of this lives on the event loop; other threads publish through `Hub.publish`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

MERGE_SECONDS = 0.5
MOST_NEWS = 2_000
"""Entries that wait for one reader before it is dropped."""
MOST_READERS = 500

Event = tuple[str, dict[str, Any]]


@dataclass(eq=False)
class _Reader:
    run: str | None
    news: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    dropped: bool = False


class Hub:
    """Hands events from the threads that make them to the readers that wait on a loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._readers: set[_Reader] = set()

    def stop(self) -> None:
        """End every reader's stream."""
        for reader in self._readers:
            reader.dropped = True
            reader.wake.set()

    def publish(self, kind: str, content: dict[str, Any]) -> None:
        """Tell every reader, from any thread; `content` names its run under `run`."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._spread, kind, content)

    def _spread(self, kind: str, content: dict[str, Any]) -> None:
        run = content.get("run") or ""
        key = (kind, run, str(content.get("name") or content.get("id") or ""))
        for reader in self._readers:
            if reader.run not in (None, run) or reader.dropped:
                continue
            merged = content
            if "metrics" in content and key in reader.news:
                names = [*reader.news[key]["metrics"], *content["metrics"]]
                merged = {**content, "metrics": list(dict.fromkeys(names))}
            reader.news[key] = merged
            if len(reader.news) > MOST_NEWS:
                reader.dropped = True
                reader.news.clear()
            reader.wake.set()

    async def read(self, run: str | None) -> AsyncIterator[Event]:
        """Yield events of one run, or of all, until the reader is too slow or the server stops."""
        reader = _Reader(run)
        self._readers.add(reader)
        try:
            while not reader.dropped:
                await reader.wake.wait()
                reader.wake.clear()
                news, reader.news = reader.news, {}
                for (kind, _, _), content in news.items():
                    yield kind, content
                await asyncio.sleep(MERGE_SECONDS)
        finally:
            self._readers.discard(reader)

    def __len__(self) -> int:
        return len(self._readers)
