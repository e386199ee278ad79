"""An HTTP proxy that fails on purpose, between a shipper and a real server.

It understands requests well enough to fail in the moments that matter: before the server hears of
a request, in the middle of a body, or after the server has committed and before the client knows.
It counts what it saw, so that a test can say how much was sent twice and whether the server ever
failed by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

PASS, DROP, REFUSE, CUT_BODY, LOSE_ANSWER = "pass", "drop", "refuse", "cut-body", "lose-answer"
FAULTS = (DROP, REFUSE, CUT_BODY, LOSE_ANSWER)
BLOCK = 64 * 1024
PART = re.compile(rb"PUT \S*/parts/([0-9a-f]{64})\S* ")


@dataclass
class Seen:
    """What went through, and what did not."""

    requests: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    server_statuses: Counter[int] = field(default_factory=Counter)
    part_bytes: Counter[str] = field(default_factory=Counter, repr=False)
    """Bytes that the client sent of each part, as far as they went on to the server."""
    part_requests: Counter[str] = field(default_factory=Counter, repr=False)

    @property
    def server_errors(self) -> int:
        """Answers that blame the server itself, other than that its disk is full."""
        return sum(
            n for status, n in self.server_statuses.items() if status >= 500 and status != 507
        )


Decide = Callable[[bytes, int], str]
"""Given a request's head and the length of its body, say what happens to it."""


def always_pass(head: bytes, length: int) -> str:
    return PASS


def random_faults(seed: int, share: float) -> Decide:
    """Fail a share of all requests, each in one of the four ways."""
    chance = random.Random(seed)

    def decide(head: bytes, length: int) -> str:
        return chance.choice(FAULTS) if chance.random() < share else PASS

    return decide


def part_cuts(seed: int, cuts: int, share: float) -> Decide:
    """Cut a share of the uploads of parts somewhere in their bodies, `cuts` times in all."""
    chance, left = random.Random(seed), [cuts]

    def decide(head: bytes, length: int) -> str:
        if PART.match(head) and length > 1 and left[0] and chance.random() < share:
            left[0] -= 1
            return CUT_BODY
        return PASS

    return decide


class FaultProxy:
    """Listen on a free port of loopback and pass requests on; a context manager.

    Args:
        port: the server's.
        decide: what happens to each request; may be replaced at any time.
    """

    def __init__(self, port: int, decide: Decide = always_pass, seed: int = 0) -> None:
        self.decide = decide
        self.seen = Seen()
        self.url = ""
        self._target = port
        self._chance = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault proxy", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=2**20)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._one_request(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            pass  # either side went away, which is what this is for
        except asyncio.CancelledError:
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _one_request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Handle one request; return whether the connection stays open."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(_header(head, b"content-length") or 0)
        self.seen.requests += 1
        fault = self.decide(head, length)
        if fault != PASS:
            self.seen.faults[fault] += 1
        if fault == DROP:
            return False
        if fault == REFUSE:
            await _skip(reader, length)
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}")
            await writer.drain()
            return True
        upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            if fault == CUT_BODY:
                await self._send_body(head, reader, upstream, self._chance.randrange(length + 1))
                with contextlib.suppress(OSError):
                    upstream.write_eof()  # the server gets what was passed on, then the end
                    await asyncio.wait_for(upstream_reader.read(BLOCK), 5)
                return False
            await self._send_body(head, reader, upstream, length)
            return await self._relay_answer(upstream_reader, writer, fault == LOSE_ANSWER)
        finally:
            upstream.close()

    async def _send_body(
        self, head: bytes, reader: asyncio.StreamReader, upstream: asyncio.StreamWriter, end: int
    ) -> None:
        """Pass a request on up to byte `end` of its body."""
        part = PART.match(head)
        if part:
            self.seen.part_requests[part[1].decode()] += 1
        upstream.write(_closing(head))
        while end:
            block = await reader.read(min(BLOCK, end))
            if not block:
                raise ConnectionResetError("the client went away")
            end -= len(block)
            if part:
                self.seen.part_bytes[part[1].decode()] += len(block)
            upstream.write(block)
            await upstream.drain()

    async def _relay_answer(
        self, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter, lose: bool
    ) -> bool:
        head = await upstream.readuntil(b"\r\n\r\n")
        self.seen.server_statuses[int(head.split(b" ", 2)[1])] += 1
        length = _header(head, b"content-length")
        if lose:
            await upstream.read(BLOCK)
            return False
        writer.write(re.sub(rb"(?i)connection: close\r\n", b"", head) if length else head)
        left = int(length) if length else 2**62
        while left and (block := await upstream.read(min(BLOCK, left))):
            left -= len(block)
            writer.write(block)
            await writer.drain()
        return length is not None and left == 0


def _header(head: bytes, name: bytes) -> bytes | None:
    found = re.search(rb"(?im)^" + name + rb": *([^\r\n]*)\r?$", head)
    return found[1] if found else None


def _closing(head: bytes) -> bytes:
    """Ask the server to close after its answer: one connection there for each request."""
    return re.sub(rb"(?im)^connection:.*\r\n", b"", head)[:-2] + b"Connection: close\r\n\r\n"


async def _skip(reader: asyncio.StreamReader, length: int) -> None:
    while length:
        block = await reader.read(min(BLOCK, length))
        if not block:
            raise ConnectionResetError("the client went away")
        length -= len(block)
