"""Events: merged for each reader, and never more than a reader can take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from endlex.server import events
from endlex.server.events import Event, Hub


async def begin_to_read(
    hub: Hub, run: str | None
) -> tuple[AsyncIterator[Event], asyncio.Future[Event]]:
    """A reader, and the first news that it gets: it waits for that already."""
    reader = hub.read(run)
    first = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    return reader, first


async def collect(hub: Hub, run: str | None, count: int, publish: Any) -> list[Event]:
    found: list[Event] = []
    reader, first = await begin_to_read(hub, run)
    publish()
    found.append(await asyncio.wait_for(first, 5))
    while len(found) < count:
        found.append(await asyncio.wait_for(anext(reader), 5))
    await reader.aclose()  # type: ignore[attr-defined]
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MERGE_SECONDS", 0.01)


def test_a_burst_is_one_message_for_each_kind() -> None:
    async def scenario() -> None:
        hub = Hub(asyncio.get_running_loop())

        def burst() -> None:
            for step in range(1000):
                names = [f"m{step % 2}"]
                hub.publish("metrics", {"run": "a", "metrics": names, "last_step": step})
                hub.publish("metrics", {"run": "b", "metrics": names, "last_step": step})

        found = await collect(hub, "a", 1, burst)
        assert found == [("metrics", {"run": "a", "metrics": ["m0", "m1"], "last_step": 999})]
        assert len(hub) == 0

    asyncio.run(scenario())


def test_news_come_from_other_threads_and_in_order_of_merging() -> None:
    async def scenario() -> None:
        hub = Hub(asyncio.get_running_loop())
        reader, waiting = await begin_to_read(hub, None)
        await asyncio.to_thread(hub.publish, "run", {"run": "a", "status": "running"})
        assert await asyncio.wait_for(waiting, 5) == ("run", {"run": "a", "status": "running"})
        hub.stop()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(anext(reader), 5)

    asyncio.run(scenario())


def test_a_reader_that_stands_still_is_dropped_not_buffered() -> None:
    async def scenario() -> None:
        hub = Hub(asyncio.get_running_loop())
        reader, waiting = await begin_to_read(hub, None)
        hub.publish("run", {"run": "first"})
        await asyncio.wait_for(waiting, 5)
        for number in range(events.MOST_NEWS + 10):
            hub.publish("run", {"run": f"run{number}"})
        await asyncio.sleep(0.05)
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(anext(reader), 5)
        assert len(hub) == 0

    asyncio.run(scenario())
