"""How a run is interrupted: asked to stop by a signal, or out of memory."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

import torch

from archerchat.errors import ArcherChatError

STOPPING = b"\nstopping after this step with a checkpoint; once more ends at once, without\n"

T = TypeVar("T")


class _Stopped(BaseException):
    """Leave interruptible work; no `except Exception` on the way may take it."""


class StopRequest:
    """Whether the user, or the system, asked the loop to end."""

    def __init__(self) -> None:
        self.asked = False
        self._interruptible = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        with suppress(OSError):  # not `print`: the signal may have come in the middle of one
            os.write(sys.stderr.fileno(), STOPPING)
        if self._interruptible:
            raise _Stopped

    def interruptible(self, work: Callable[[], T]) -> T | None:
        """Do long work that changes nothing, or leave it at the first request: then None."""
        try:  # no context manager: its own calls would be places for the signal to arrive
            self._interruptible = True
            return work()
        except _Stopped:
            return None
        finally:
            self._interruptible = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as requests; outside the main thread there are none to take."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._ask) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


@contextmanager
def explained_memory() -> Iterator[None]:
    """Turn running out of memory into advice.

    Raises:
        ArcherChatError: instead of torch's error, on accelerators and on CPUs.
    """
    try:
        yield
    except RuntimeError as error:  # OutOfMemoryError is one; CPUs raise nothing more special
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate" not in str(error):
            raise
        raise ArcherChatError(
            "out of memory: lower --device-batch-size (`archerchat plan` estimates what fits; a "
            "run that has begun takes another one with --extend). Checkpoints are intact"
        ) from error
