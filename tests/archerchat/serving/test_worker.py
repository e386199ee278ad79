"""When tokens cross from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("fastapi")
from archerchat import load
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Request
from archerchat.serving import worker
from archerchat.serving.worker import Worker


def test_the_first_token_crosses_at_once_and_fast_ones_together(
    served_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "CROSSING_SECONDS", 60.0)
    engine = load("tiny", device="cpu", dtype="float32", home=served_home.root).engine

    async def hear() -> list[int]:
        thread = Worker(max_waiting=4)
        thread.start()
        stream = thread.submit(engine, [Request([1], SamplingParams(6, num_samples=2))])
        crossed = []
        while stream.open_samples:
            crossed.append(len(await stream.next()))
        stream.close()
        await asyncio.to_thread(thread.stop)
        return crossed

    assert asyncio.run(hear()) == [2, 10]
