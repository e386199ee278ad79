"""When tokens cross from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("fastapi")
from archerchat import load
from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Event, Request
from archerchat.serving import worker
from archerchat.serving.worker import Stream, Worker


@pytest.mark.parametrize("overlap", [False, True])
def test_the_first_token_crosses_at_once_and_fast_ones_together(
    served_home: Any, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """Where reading overlaps computing, the step that admits a request brings no token yet."""
    monkeypatch.setattr(worker, "CROSSING_SECONDS", 60.0)
    model = load("tiny", device="cpu", dtype="float32", home=served_home.root).engine.model
    engine = Engine(model, overlap=overlap)

    crossed, deliver = [], Worker._deliver

    def listen(self: Worker, events: Sequence[Event], now: float) -> None:
        crossed.append(len(events))
        deliver(self, events, now)

    monkeypatch.setattr(Worker, "_deliver", listen)

    async def hear() -> None:
        thread = Worker(max_samples=4)
        thread.start()
        assert sys.getswitchinterval() == pytest.approx(worker.SWITCH_SECONDS)
        stream = Stream(thread, engine, [Request([1], SamplingParams(6, num_samples=2))])
        thread.submit(stream)
        async for _ in stream.arriving():
            pass
        thread.close(stream)
        await asyncio.to_thread(thread.stop)

    asyncio.run(hear())
    assert crossed == [2, 10]


def test_a_stream_may_be_closed_after_the_end(served_home: Any) -> None:
    """As when the server ends while it answers."""
    model = load("tiny", device="cpu", dtype="float32", home=served_home.root).engine.model

    async def leave() -> None:
        worker = Worker(max_samples=1)
        worker.start()
        stream = Stream(worker, Engine(model), [Request([1], SamplingParams(50))])
        worker.submit(stream)
        await asyncio.to_thread(worker.stop)
        worker.close(stream)
        assert worker.samples == 0

    asyncio.run(leave())
