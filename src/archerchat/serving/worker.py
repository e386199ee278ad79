"""The thread that owns the engines, and the streams of events that it sends to the event loop.

    stream = worker.submit(engine, requests)    # one HTTP request: a prompt or several
    events = await stream.next()                # what happened to them since the last call
    stream.close()                              # their rows are free with the next step

    found = await worker.call(function)         # runs between two steps, with the models at rest

Engines and models are touched by this thread alone. Events cross over in one call of the loop,
whatever the number of rows. Steps that follow each other fast cross over together: each crossing
holds up the next step, because only one thread at a time can run Python.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from queue import Empty, SimpleQueue
from typing import TypeVar

from archerchat.errors import ArcherChatError, UsageError
from archerchat.inference.engine import Engine
from archerchat.inference.sequence import Event, Request

logger = logging.getLogger("archerchat")
T = TypeVar("T")
TASK_SECONDS = 0.05
"""How long other work, such as scoring, may hold up the next step; one piece of it always runs."""
CROSSING_SECONDS = 0.05
"""Least time between crossings that bring neither the first token nor the end of an answer."""
SWITCH_SECONDS = 0.001
"""How long the thread may hold up the loop; Python's own 5 ms would make first tokens late."""


class Overloaded(Exception):
    """The queue is full; the client may try again."""


class GenerationFailed(ArcherChatError):
    """Report that the model stopped with an error, such as a lack of memory."""


@dataclass(eq=False)
class Stream:
    """What happens to the requests of one HTTP request.

    Attributes:
        first_number: the number of the first request; the others follow.
        open_samples: samples whose last event has not been returned.
        started, first_token, last_token: `time.monotonic()` of its start and its tokens.
        cached: prompt tokens that were not run again, by request.
        tokens: said so far, stop tokens included.
    """

    worker: Worker
    engine: Engine
    requests: Sequence[Request]
    first_number: int = 0
    open_samples: int = 0
    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    last_token: float = 0.0
    cached: dict[int, int] = field(default_factory=dict)
    tokens: int = 0

    def __post_init__(self) -> None:
        samples = [request.params.num_samples for request in self.requests]
        self.num_samples = sum(samples)
        self._first_samples = list(accumulate(samples, initial=0))
        self._events: list[tuple[int, Event]] = []
        self._error: str | None = None
        self._arrived = asyncio.Event()

    async def next(self, patience: float | None = None) -> list[tuple[int, Event]]:
        """Return new events, each with the number of its sample among all of this stream's.

        Args:
            patience: seconds to wait for one; after that none is returned.

        Raises:
            GenerationFailed: the model stopped with an error.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._arrived.wait()
        if self._error is not None:
            raise GenerationFailed(self._error)
        self._arrived.clear()
        events, self._events = self._events, []
        self.open_samples -= sum(event.finish_reason is not None for _, event in events)
        return events

    def put(self, event: Event, now: float) -> None:
        """Take an event; called on the loop."""
        index = event.request - self.first_number
        self.cached.setdefault(index, event.cached)
        self.tokens += 1
        self.first_token = self.first_token or now
        self.last_token = now
        self._events.append((self._first_samples[index] + event.sample, event))
        self._arrived.set()

    def fail(self, message: str) -> None:
        """Let `next` raise; called on the loop."""
        self._error = message
        self._arrived.set()

    def close(self) -> None:
        """End what is still running; may be called twice."""
        self.worker.close(self)

    def timings(self) -> dict[str, float]:
        """Return counts and speeds, under llama.cpp's names."""
        cached, first = sum(self.cached.values()), self.first_token or time.monotonic()
        run = sum(len(request.prompt) for request in self.requests) - cached
        waited, decoded = first - self.started, self.last_token - first
        decoding = max(self.tokens - self.num_samples, 0)
        found = {
            "cache_n": cached, "prompt_n": run, "prompt_ms": 1000 * waited,
            "prompt_per_second": run / max(waited, 1e-9), "predicted_n": self.tokens,
            "predicted_ms": 1000 * decoded if decoding else 0.0,
            "predicted_per_second": decoding / max(decoded, 1e-9),
        }  # fmt: skip
        return {name: round(value, 3) for name, value in found.items()}


class Worker:
    """Run engines in a thread of its own.

    Args:
        max_waiting: samples in work beyond which `submit` refuses more.

    Attributes:
        samples: samples in work, running or waiting.
        counts: what happened since the start, under the names of /stats.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._inbox: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._streams: dict[int, Stream] = {}  # by the number of each request, on the loop
        self._engines: dict[Engine, None] = {}  # those that may be busy, on the thread
        self._events: list[Event] = []  # that have not crossed over, on the thread
        self._crossed = 0.0
        self._next_number = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)
        self.samples = 0
        names = ("requests", "errors", "prompt_tokens", "cached_tokens", "generated_tokens")
        self.counts = {f"{name}_total": 0 for name in names}

    def start(self) -> None:
        """Start the thread; called on the event loop that will use it."""
        self._loop = asyncio.get_running_loop()
        sys.setswitchinterval(SWITCH_SECONDS)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the running step."""
        self._inbox.put(None)
        self._thread.join()

    async def call(self, function: Callable[[], T]) -> T:
        """Return what `function` returns, run by the thread between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():  # or else the client went away
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

        self._inbox.put(run)
        return await asyncio.wrap_future(future)

    def check(self, samples: int) -> None:
        """Refuse more samples than there ever (UsageError) or now (Overloaded) is room for."""
        if samples > self._max_waiting:
            raise UsageError(f"{samples} answers are more than the {self._max_waiting} of a queue")
        if self.samples + samples > self._max_waiting:
            raise Overloaded(f"{self.samples} answers are in work: try again in a moment")

    def submit(self, engine: Engine, requests: Sequence[Request]) -> Stream:
        """Queue the requests of one HTTP request, all or none; raises as both `check` do."""
        stream = Stream(self, engine, requests, self._next_number)
        samples = stream.open_samples = stream.num_samples
        self.check(samples)
        for request in requests:
            engine.check(request)
        numbers = range(self._next_number, self._next_number + len(requests))
        self._next_number = numbers.stop
        self._streams |= dict.fromkeys(numbers, stream)
        self.samples += samples
        self.counts["requests_total"] += 1
        self.counts["prompt_tokens_total"] += sum(len(request.prompt) for request in requests)

        def add() -> None:
            self._engines[engine] = None
            for number, request in zip(numbers, requests, strict=True):
                engine.add(number, request)

        self._inbox.put(add)
        return stream

    def close(self, stream: Stream) -> None:
        """Forget a stream; cancel what is still running of it."""
        numbers = [number for number, each in self._streams.items() if each is stream]
        if not numbers:
            return
        for number in numbers:
            del self._streams[number]
        self.samples -= stream.num_samples
        self.counts["cached_tokens_total"] += sum(stream.cached.values())
        if stream.open_samples:

            def cancel() -> None:
                for number in numbers:
                    stream.engine.cancel(number)

            self._inbox.put(cancel)

    def _run(self) -> None:
        while True:
            busy = [engine for engine in self._engines if engine.busy]
            self._engines = dict.fromkeys(busy)
            until = time.monotonic() + TASK_SECONDS
            with suppress(Empty):
                while not busy or time.monotonic() < until:
                    task = self._inbox.get(block=not busy)
                    if task is None:
                        return
                    task()
                    busy = busy or [engine for engine in self._engines if engine.busy]
            for engine in self._engines:
                self._step(engine)

    def _step(self, engine: Engine) -> None:
        try:
            self._cross(engine.admit())
            self._cross(engine.advance())
        except Exception as error:  # such as a lack of memory: the next request may be smaller
            logger.exception("the engine failed")
            engine.reset()
            self._post(self._fail, engine, f"the model failed: {type(error).__name__}")

    def _cross(self, events: Sequence[Event]) -> None:
        """Hand events to the loop, now or with those of later steps."""
        self._events += events
        now = time.monotonic()
        at_once = any(event.first or event.finish_reason for event in events)
        if self._events and (at_once or now - self._crossed >= CROSSING_SECONDS):
            self._post(self._deliver, self._events, now)
            self._events, self._crossed = [], now

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed, so nobody listens
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, events: Sequence[Event], now: float) -> None:
        for event in events:
            if (stream := self._streams.get(event.request)) is not None:
                stream.put(event, now)
                self.counts["generated_tokens_total"] += 1

    def _fail(self, engine: Engine, message: str) -> None:
        self.counts["errors_total"] += 1
        for stream in {each for each in self._streams.values() if each.engine is engine}:
            stream.fail(message)
