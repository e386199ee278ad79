"""A request to stop that a signal handler may make, and that any thread can wait for."""

from __future__ import annotations

import contextlib
import os
import select


class Stop:
    """Like `threading.Event`, but without a lock that a signal handler could find taken."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._is_set = False

    def set(self) -> None:
        """Ask everyone to stop."""
        self._is_set = True
        with contextlib.suppress(OSError):
            os.write(self._writing, b"x")

    def is_set(self) -> bool:
        """Whether someone asked."""
        return self._is_set

    def wait(self, seconds: float) -> bool:
        """Wait that long at most, and return whether someone asked; nothing is taken back."""
        if not self._is_set and seconds > 0:
            select.select([self._reading], [], [], seconds)
        return self._is_set
