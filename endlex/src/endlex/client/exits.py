"""Runs that the program did not finish: recorded as it exits, with what ended it.

`sys.excepthook` notes the exception that nobody caught, `sys.exit` its code, and `atexit` finishes
the runs that are left. Python tells nobody of a `SystemExit` that is raised without `sys.exit`: a
run that it ends counts as finished. A process that is killed does nothing of this; the shipper sees
then that the writer is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
from functools import cache, wraps
from types import TracebackType
from typing import Any, ClassVar, NoReturn, Protocol

from endlex.client.warning import warn
from endlex.protocol import EndlexError, Status


class Finishable(Protocol):
    """A run, as far as this module cares."""

    @property
    def recorded(self) -> int:
        """How many records it has."""

    def finish(self, status: Status = ...) -> None:
        """Record the end."""


class _Ending:
    """What this process knows about its end."""

    unfinished: ClassVar[list[Finishable]] = []
    status: ClassVar[Status] = "finished"
    exits: ClassVar[list[tuple[Finishable, int, Status]]] = []
    """The runs that `sys.exit` left, with what they had recorded by then."""


def status_of(error: BaseException | None) -> Status:
    """How a run ended that this exception left: `sys.exit()` is an end like any other."""
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return "finished"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def finish_at_exit(run: Finishable) -> None:
    """Finish `run` when the interpreter exits, unless it is finished by then."""
    _watch_exit()
    _Ending.unfinished.append(run)


def forget(run: Finishable) -> None:
    """Leave `run` alone at exit: it is finished."""
    with contextlib.suppress(ValueError):
        _Ending.unfinished.remove(run)


@cache
def _watch_exit() -> None:
    atexit.register(_finish_all)
    previous = sys.excepthook

    def note_exception(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> Any:
        _Ending.status = status_of(error)
        return previous(kind, error, traceback)

    sys.excepthook = note_exception
    plain_exit = sys.exit

    @wraps(plain_exit)
    def note_exit(status: Any = None, /) -> NoReturn:
        if threading.current_thread() is threading.main_thread():  # else it ends a thread alone
            ended = status_of(SystemExit(status))
            _Ending.exits = [(run, run.recorded, ended) for run in _Ending.unfinished]
        plain_exit(status)

    sys.exit = note_exit


def _status(run: Finishable) -> Status:
    for left, recorded, status in _Ending.exits:
        # One that has recorded more since went on: something caught that exit.
        if left is run and left.recorded == recorded and _Ending.status == "finished":
            return status
    return _Ending.status


def _finish_all() -> None:
    for run in list(_Ending.unfinished):
        try:
            run.finish(_status(run))
        except (EndlexError, OSError) as error:
            warn(f"the end of the run could not be recorded: {error}")
