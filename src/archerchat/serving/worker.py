"""The thread that owns the engines; handlers on the event loop talk to it by two verbs.

    stream = worker.submit(engine, requests)    # one HTTP request: a prompt or several
    async for events in stream: ...             # what happened to them, a step at a time
    stream.close()                              # their rows are free with the next step

    found = await worker.call(function)         # runs between two steps, with the models at rest

Engines and models are touched by this thread alone. What happens in a step crosses over in one call
of the loop, whatever the number of rows.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TypeVar

from archerchat.errors import ArcherChatError, UsageError
from archerchat.inference.engine import Engine
from archerchat.inference.sequence import Event, Request

logger = logging.getLogger("archerchat")
T = TypeVar("T")
TASK_SECONDS = 0.05
"""How long other work, such as scoring, may hold up the next step; one piece of it always runs."""


class Overloaded(Exception):
    """The queue is full; the client may try again."""


class GenerationFailed(ArcherChatError):
    """Report that the model stopped with an error, such as a lack of memory."""


@dataclass(eq=False)
class Stream:
    """What happens to the requests of one HTTP request.

    Attributes:
        numbers: those of the requests.
        started, first_token, last_token: `time.monotonic()` of its start and its tokens.
        cached: prompt tokens that were not run again, by request.
        tokens: said so far, stop tokens included.
    """

    worker: Worker
    engine: Engine
    requests: Sequence[Request]
    numbers: range
    open_samples: int
    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    last_token: float = 0.0
    cached: dict[int, int] = field(default_factory=dict)
    tokens: int = 0
    queue: asyncio.Queue[list[Event] | Exception] = field(default_factory=asyncio.Queue)

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        """Yield events until all samples have ended; `choice` numbers them.

        Raises:
            GenerationFailed: the model stopped with an error.
        """
        while self.open_samples:
            events = await self.queue.get()
            if isinstance(events, Exception):
                raise events
            self.open_samples -= sum(event.finish_reason is not None for event in events)
            yield events
        self.close()

    def choice(self, event: Event) -> int:
        """Return the number of the sample among all of this stream's."""
        before = self.requests[: self.numbers.index(event.request)]
        return sum(request.params.num_samples for request in before) + event.sample

    def close(self) -> None:
        """End what is still running; may be called twice."""
        self.worker.close(self)

    def timings(self) -> dict[str, float]:
        """Return counts and speeds, under llama.cpp's names."""
        cached, first = sum(self.cached.values()), self.first_token or time.monotonic()
        run = sum(len(request.prompt) for request in self.requests) - cached
        waited, decoded = first - self.started, self.last_token - first
        decoding = max(self.tokens - len(self.requests), 0)
        found = {
            "cache_n": cached,
            "prompt_n": run,
            "prompt_ms": 1000 * waited,
            "prompt_per_second": run / max(waited, 1e-9),
            "predicted_n": self.tokens,
            "predicted_ms": 1000 * decoded if decoding else 0.0,
            "predicted_per_second": decoding / max(decoded, 1e-9),
        }
        return {name: round(value, 3) for name, value in found.items()}


class Worker:
    """Run engines in a thread of its own.

    Args:
        max_waiting: samples in work beyond which `submit` refuses more.

    Attributes:
        samples: samples in work, running or waiting.
        prompt_tokens, cached_tokens, generated_tokens, requests, errors: counts since the start.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._inbox: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._streams: dict[int, Stream] = {}  # by the number of each request, on the loop
        self._engines: dict[Engine, None] = {}  # those that may be busy, on the thread
        self._next_number = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)
        self.samples = self.requests = self.errors = 0
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0

    def start(self) -> None:
        """Start the thread; called on the event loop that will use it."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the running step."""
        self._inbox.put(None)
        self._thread.join()

    async def call(self, function: Callable[[], T]) -> T:
        """Return what `function` returns, run by the thread between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():  # the client went away
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._inbox.put(run)
        return await asyncio.wrap_future(future)

    def submit(self, engine: Engine, requests: Sequence[Request]) -> Stream:
        """Queue the requests of one HTTP request.

        Raises:
            Overloaded: too many samples are in work.
            UsageError: the engine cannot serve one of them; none is queued.
        """
        samples = sum(request.params.num_samples for request in requests)
        if samples > self._max_waiting:
            raise UsageError(f"{samples} answers are more than the {self._max_waiting} of a queue")
        if self.samples + samples > self._max_waiting:
            raise Overloaded(f"{self.samples} answers are in work: try again in a moment")
        for request in requests:
            engine.check(request)
        numbers = range(self._next_number, self._next_number + len(requests))
        self._next_number = numbers.stop
        stream = Stream(self, engine, requests, numbers, samples)
        self._streams |= dict.fromkeys(numbers, stream)
        self.samples += samples
        self.requests += 1
        self.prompt_tokens += sum(len(request.prompt) for request in requests)

        def add() -> None:
            self._engines[engine] = None
            for number, request in zip(numbers, requests, strict=True):
                engine.add(number, request)

        self._inbox.put(add)
        return stream

    def close(self, stream: Stream) -> None:
        """Forget a stream; cancel what is still running of it."""
        if stream.numbers.start not in self._streams:
            return
        for number in stream.numbers:
            del self._streams[number]
        self.samples -= sum(request.params.num_samples for request in stream.requests)
        if stream.open_samples:

            def cancel() -> None:
                for number in stream.numbers:
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
            events = engine.step()
        except Exception as error:  # such as a lack of memory: the next request may be smaller
            logger.exception("the engine failed")
            engine.reset()
            self._post(self._fail, engine, f"the model failed: {type(error).__name__}")
        else:
            self._post(self._deliver, events, time.monotonic())

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed, so nobody listens
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, events: Sequence[Event], now: float) -> None:
        """Hand a step's events to the streams that they belong to."""
        found: dict[Stream, list[Event]] = {}
        for event in events:
            if (stream := self._streams.get(event.request)) is None:
                continue
            if event.request not in stream.cached:
                stream.cached[event.request] = event.cached
                self.cached_tokens += event.cached
            stream.tokens += 1
            self.generated_tokens += 1
            found.setdefault(stream, []).append(event)
        for stream, of_stream in found.items():
            stream.first_token = stream.first_token or now
            stream.last_token = now
            stream.queue.put_nowait(of_stream)

    def _fail(self, engine: Engine, message: str) -> None:
        self.errors += 1
        for stream in {each for each in self._streams.values() if each.engine is engine}:
            stream.queue.put_nowait(GenerationFailed(message))
