"""Run an iterator ahead of its consumer, in a background thread with a bounded queue."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_STOP_SECONDS = 5.0
"""How long to wait for a thread that is asked to stop; it is a daemon, so it cannot hold us."""


class _Queue(Generic[T]):
    """What both threads share. The thread must not refer to `Prefetcher`, or it never dies."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.items: deque[T] = deque()
        self.changed = threading.Condition()
        self.stopped = False
        self.ended: BaseException | None = None


class Prefetcher(Generic[T]):
    """Iterate over `source`, whose next items a daemon thread prepares meanwhile.

    What `source` raises, `next` raises after the items before it. The thread ends with
    `close`, when this object is collected, or before the interpreter exits (a daemon thread
    inside compiled code could otherwise crash it then).

    Attributes:
        wait_seconds: how long `next` has waited, in all.
    """

    def __init__(self, source: Iterator[T], depth: int) -> None:
        self.wait_seconds = 0.0
        self._queue: _Queue[T] = _Queue(depth)
        thread = threading.Thread(
            target=_produce, args=(source, self._queue), name="prefetch", daemon=True
        )
        self._finalizer = weakref.finalize(self, _stop, self._queue, thread)
        thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        queue = self._queue
        began = time.perf_counter()
        with queue.changed:
            queue.changed.wait_for(lambda: queue.items or queue.ended)
            self.wait_seconds += time.perf_counter() - began
            if not queue.items:
                assert queue.ended is not None
                raise queue.ended
            item = queue.items.popleft()
            queue.changed.notify_all()
        return item

    def close(self) -> None:
        """Stop the thread; `next` then raises StopIteration. May be called again."""
        self._finalizer()


def _produce(source: Iterator[T], queue: _Queue[T]) -> None:
    ended: BaseException = StopIteration()
    try:
        for item in source:
            with queue.changed:
                queue.changed.wait_for(lambda: queue.stopped or len(queue.items) < queue.depth)
                if queue.stopped:
                    break
                queue.items.append(item)
                queue.changed.notify_all()
    except BaseException as error:
        ended = error
    with queue.changed:
        queue.ended = queue.ended or ended
        queue.changed.notify_all()


def _stop(queue: _Queue[T], thread: threading.Thread) -> None:
    with queue.changed:
        queue.stopped = True
        queue.items.clear()
        queue.ended = StopIteration()
        queue.changed.notify_all()
    if thread is not threading.current_thread():
        thread.join(_STOP_SECONDS)
