"""The thread that owns the engines, and the streams of events that it sends to the event loop.

    stream = Stream(worker, engine, requests)   # one HTTP request: a prompt or several
    worker.submit(stream)
    async for events in stream.arriving(): ...  # what happened to them, until all have ended
    worker.close(stream)                        # their rows are free with the next step

    found = await worker.call(function)         # runs between two steps, with the models at rest

Engines and models are touched by this thread alone. Events of steps that follow each other fast
cross over together: each crossing holds up the next step, because only one thread at a time can
run Python.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from archerchat.inference.engine import Engine
from archerchat.inference.sequence import Event, Request
from archerchat.serving.guard import APIError

logger = logging.getLogger("archerchat")
T = TypeVar("T")
CALL_SECONDS = 0.05
"""How long calls, such as scoring, may hold up the next step; one that has begun is finished."""
CROSSING_SECONDS = 0.05
"""Least time between crossings that bring neither the first token nor the end of an answer."""
SILENT_SECONDS = 15
"""How long a stream may say nothing, not even that it is still at work."""
SWITCH_SECONDS = 0.001
"""How long the thread may hold up the loop; Python's own 5 ms would make first tokens late."""


class Stream:
    """What happens to the requests of one HTTP request, which have the same parameters.

    Attributes:
        numbers: the requests' numbers while they are in work.
        open_samples: samples whose last event has not been yielded.
        said: all events of each sample that have been yielded.
        cached: prompt tokens that were not run again.
        tokens: said so far, stop tokens included.
    """

    def __init__(self, worker: Worker, engine: Engine, requests: Sequence[Request]) -> None:
        self.worker, self.engine, self.requests = worker, engine, requests
        self.prompt_tokens = sum(len(request.prompt) for request in requests)
        self.num_samples = sum(request.params.num_samples for request in requests)
        self.open_samples, self.cached, self.tokens = self.num_samples, 0, 0
        self.numbers = range(0)
        self.said: list[list[Event]] = [[] for _ in range(self.num_samples)]
        self.error: APIError | None = None
        self.arrived = asyncio.Event()
        self._events: dict[int, list[Event]] = {}
        self._started = time.monotonic()
        self._first_token: float | None = None
        self._last_token = 0.0

    def begin(self, echoes: Sequence[Sequence[Event]]) -> None:
        """Let each sample begin with events of its prompt, which has a list of its own."""
        each = self.requests[0].params.num_samples
        repeated = {i: list(echoes[i // each]) for i in range(self.num_samples)}
        self._events = {i: events for i, events in repeated.items() if events}
        if self._events:
            self.arrived.set()

    async def arriving(self) -> AsyncIterator[dict[int, list[Event]]]:
        """Yield each sample's next events, by its index, until all have ended; none in a silence.

        Raises:
            APIError: the model stopped with an error, such as a lack of memory.
        """
        while self.open_samples:
            with suppress(TimeoutError):
                async with asyncio.timeout(SILENT_SECONDS):
                    await self.arrived.wait()
            if self.error is not None:
                raise self.error
            self.arrived.clear()
            events, self._events = self._events, {}
            for index, found in events.items():
                self.said[index] += found
                self.open_samples -= found[-1].finish_reason is not None
            yield events

    def put(self, event: Event, now: float) -> None:
        """Take an event; called on the loop. Every request has the same number of samples."""
        if event.first and event.sample == 0:
            self.cached += event.cached
        self.tokens += 1
        self._first_token = self._first_token or now
        self._last_token = now
        before = self.numbers.index(event.request) * self.requests[0].params.num_samples
        self._events.setdefault(before + event.sample, []).append(event)
        self.arrived.set()

    def timings(self) -> dict[str, float]:
        """Return counts and speeds, under llama.cpp's names."""
        first = self._first_token or time.monotonic()
        ran = self.prompt_tokens - self.cached
        waited, decoded = first - self._started, self._last_token - first
        decoding = max(self.tokens - self.num_samples, 0)
        return {
            "cache_n": self.cached,
            "prompt_n": ran,
            "prompt_ms": round(1000 * waited, 3),
            "prompt_per_second": round(ran / max(waited, 1e-9), 3),
            "predicted_n": self.tokens,
            "predicted_ms": round(1000 * decoded, 3) if decoding else 0.0,
            "predicted_per_second": round(decoding / max(decoded, 1e-9), 3),
        }


class Worker:
    """Run engines in a thread of its own, for at most `max_samples` samples in work.

    Attributes:
        samples: samples in work, running or waiting.
        counts: what happened since the start, under the names of /stats.
    """

    def __init__(self, max_samples: int) -> None:
        self._max_samples = max_samples
        self._thread = ThreadPoolExecutor(1, "engines")
        self._streams: dict[int, Stream] = {}  # by the number of each request, on the loop
        self._engines: set[Engine] = set()  # those that are busy, on the thread
        self._events: list[Event] = []  # that have not crossed over, on the thread
        self._crossed = self._stepped = 0.0
        self._next_number = self.samples = 0
        self.started = time.monotonic()
        names = ("requests", "errors", "prompt_tokens", "cached_tokens", "generated_tokens")
        self.counts = {f"{name}_total": 0 for name in names}

    def start(self) -> None:
        """Get ready; called on the event loop that will use it."""
        self._loop = asyncio.get_running_loop()
        sys.setswitchinterval(SWITCH_SECONDS)

    def stop(self) -> None:
        """End the thread after the running step."""
        self._thread.shutdown(cancel_futures=True)

    async def call(self, function: Callable[[], T]) -> T:
        """Return what `function` returns, run by the thread between two steps."""

        def run() -> T:
            if time.monotonic() - self._stepped > CALL_SECONDS:
                self._step_all()
            return function()

        return await self._loop.run_in_executor(self._thread, run)

    def check(self, stream: Stream) -> None:
        """Refuse what the engine cannot serve, or what there is no room for, ever or now."""
        samples, most = stream.num_samples, self._max_samples
        if samples > most:
            raise APIError(f"{samples} answers are more than the {most} of a queue")
        if self.samples + samples > most:
            message = f"{self.samples} answers are in work: try again in a moment"
            raise APIError(message, code="queue_full", status=429)
        for request in stream.requests:
            stream.engine.check(request)

    def submit(self, stream: Stream) -> None:
        """Queue the requests of one HTTP request, all or none; raises as `check` does."""
        self.check(stream)
        numbers = range(self._next_number, self._next_number + len(stream.requests))
        stream.numbers, self._next_number = numbers, numbers.stop
        self._streams |= dict.fromkeys(numbers, stream)
        self.samples += stream.num_samples
        self.counts["requests_total"] += 1
        self.counts["prompt_tokens_total"] += stream.prompt_tokens

        def add() -> None:
            if not self._engines:
                self._thread.submit(self._run)
            self._engines.add(stream.engine)
            for number, request in zip(numbers, stream.requests, strict=True):
                stream.engine.add(number, request)

        self._thread.submit(self._attempt, stream.engine, add)

    def close(self, stream: Stream) -> None:
        """Forget a stream; cancel what is still running of it. May be called twice."""
        numbers, stream.numbers = stream.numbers, range(0)
        if not numbers:
            return
        for number in numbers:
            del self._streams[number]
        self.samples -= stream.num_samples
        self.counts["cached_tokens_total"] += stream.cached

        def cancel() -> None:
            for number in numbers:
                stream.engine.cancel(number)

        if stream.open_samples:
            with suppress(RuntimeError):  # the thread has ended
                self._thread.submit(self._attempt, stream.engine, cancel)

    def _run(self) -> None:
        self._step_all()
        self._engines = {engine for engine in self._engines if engine.busy}
        if self._engines:  # after what was submitted meanwhile
            with suppress(RuntimeError):  # the thread has ended
                self._thread.submit(self._run)

    def _step_all(self) -> None:
        for engine in list(self._engines):
            self._attempt(engine, self._step, engine)
        self._stepped = time.monotonic()

    def _step(self, engine: Engine) -> None:
        self._cross(engine.admit())
        self._cross(engine.advance())

    def _attempt(self, engine: Engine, task: Callable[..., None], *arguments: object) -> None:
        """Run a task. If it fails, so do the engine's requests; the next one may succeed."""
        try:
            task(*arguments)
        except Exception as error:  # such as a lack of memory
            logger.exception("the engine failed")
            self._post(self._fail, engine, f"the model failed: {type(error).__name__}")
            try:
                engine.reset()
            except Exception:
                logger.exception("the engine could not be reset")
                self._engines.discard(engine)  # its next request tries again

    def _cross(self, events: Sequence[Event]) -> None:
        """Hand events to the loop, now or with those of later steps."""
        self._events += events
        now = time.monotonic()
        at_once = any(event.first or event.finish_reason for event in events)
        if self._events and (at_once or now - self._crossed >= CROSSING_SECONDS):
            self._post(self._deliver, self._events, now)
            self._events, self._crossed = [], now

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed, so nobody listens
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, events: Sequence[Event], now: float) -> None:
        for event in events:
            if (stream := self._streams.get(event.request)) is not None:
                stream.put(event, now)
                self.counts["generated_tokens_total"] += 1

    def _fail(self, engine: Engine, message: str) -> None:
        self.counts["errors_total"] += 1
        for stream in self._streams.values():
            if stream.engine is engine:
                stream.error = APIError(message, status=500)
                stream.arrived.set()
