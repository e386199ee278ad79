"""The shipper: sends what a run's directory holds, outlives the trainer, ends when all is there.

    python -m endlex.client.shipper DIR        with ENDLEX_URL and ENDLEX_TOKEN

`endlex.init` starts it; one serves a directory, by the lock of `shipper.lock`. It looks at the
journals' sizes twice a second and sends what is new from the offset that the server acknowledged;
after any fault it does the same again, forever, with growing waits. Checkpoints go in a thread of
their own, oldest first; one that can never be published is reported and kept. All that it knows is
on the disk or on the server, so it may be killed at any moment. It ends when every session's writer
is gone and everything is acknowledged; a run that is resumed meanwhile starts another one, which
waits for the lock: what begins before the lock is given up is sent by the old, the rest by the new.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from endlex.client.checkpoints import drop_replaced, staged_names, waiting_media
from endlex.client.journal_sync import JournalShipper
from endlex.client.process import Stop, replace_unencodable
from endlex.client.run_directory import require_run_file, server_token, server_url
from endlex.client.shipping import (
    BACKGROUND,
    DONE,
    STOPPED,
    holding,
    read_state,
    say,
    take_lock,
    write_state,
)
from endlex.client.system_stats import SAMPLE_SECONDS, SystemRecorder
from endlex.client.transport import REFUSED_SECONDS, Backoff, Refused, Retry, Transport
from endlex.client.uploads import Uploader
from endlex.protocol import EndlexError

CHECKPOINT_POLL_SECONDS = 0.5
ALL_MEDIA = "media/"
"""Stands for all waiting media among the checkpoints, whose names have no slash."""


class CheckpointShipper:
    """Send the checkpoints and media that wait in a run's directory.

    `send` sends one; `start` sends all that comes, in a thread, until `stop`.

    Args:
        ready: asked whether the server knows the run by now.
    """

    def __init__(
        self,
        directory: Path,
        run: str,
        transport: Transport,
        *,
        ready: Callable[[], bool] = lambda: True,
    ) -> None:
        self._directory, self._run, self._transport = directory, run, transport
        self._ready = ready
        self._stop = Stop()
        self._backoffs: defaultdict[str, Backoff] = defaultdict(Backoff)
        self._media_at = 0.0
        """When media may be tried again: their faults hold up no checkpoint."""
        self._states: dict[str, dict[str, Any]] = {}
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, seconds: float = 2.0) -> None:
        """End, and leave a request behind that takes longer than that."""
        self._stop.set()
        self._thread.join(seconds)

    def states(self) -> dict[str, dict[str, Any]]:
        """By checkpoint: `state`, `done_bytes`, `total_bytes` and `error`."""
        return dict(self._states)

    def waiting(self) -> list[str]:
        """Return what is here and may be sent: `ALL_MEDIA`, and checkpoints, oldest first."""
        media = [ALL_MEDIA] if waiting_media(self._directory) else []
        states = self.states()
        staged = staged_names(self._directory)
        return media + [n for n in staged if states.get(n, {}).get("state") != "failed"]

    def forget(self, name: str) -> None:
        """Drop the state of one that was given up."""
        self._states.pop(name, None)

    def _set(self, name: str, state: str, error: str | None = None, **figures: int) -> None:
        old = self._states.get(name, {"done_bytes": 0, "total_bytes": 0})
        self._states[name] = {**old, "state": state, "error": error, **figures}

    def send(self, name: str, progress: Callable[[int, int], None] | None = None) -> None:
        """Send one of those that wait, and note how that went.

        Raises:
            TransportError: not now.
            OSError: not now, such as on a full disk.
            EndlexError: it never can be sent; a `CheckpointFailed` if that is due to its files.
        """

        def note(done: int, total: int) -> None:
            if done > self._states[name]["done_bytes"]:
                self._backoffs[name].reset()
            self._set(name, "sending", done_bytes=done, total_bytes=total)
            if progress is not None:
                progress(done, total)

        uploader = Uploader(self._transport, note, self._stop.is_set)
        self._set(name, "hashing")
        try:
            if name == ALL_MEDIA:
                uploader.send_media(self._directory)
            else:
                uploader.send_staged(self._directory, self._run, name)
        except EndlexError as error:
            is_refused = isinstance(error, Refused)
            state = "refused" if is_refused else "waiting" if isinstance(error, Retry) else "failed"
            self._set(name, state, str(error))
            raise
        except Exception as error:  # a full disk, or a fault of ours
            self._set(name, "waiting", f"{type(error).__name__}: {error}")
            raise
        self._set(name, "published")

    def _work(self) -> None:
        wait = 0.0
        while not self._stop.wait(wait):
            try:
                wait = self._send_waiting() if self._ready() else CHECKPOINT_POLL_SECONDS
            except Exception as error:  # such as a full disk: nothing ends the thread
                say(f"checkpoints wait: {type(error).__name__}: {error}")
                wait = REFUSED_SECONDS
        self._transport.close()

    def _send_waiting(self) -> float:
        """Send what waits; return the seconds until the next look."""
        for name in drop_replaced(self._directory):
            self._set(name, "replaced")
        for name in self.waiting():
            if self._stop.is_set() or (name == ALL_MEDIA and time.monotonic() < self._media_at):
                continue
            wait = self._attempt(name)
            if name == ALL_MEDIA:
                self._media_at = time.monotonic() + wait
            elif wait:
                return wait
        return CHECKPOINT_POLL_SECONDS

    def _attempt(self, name: str) -> float:
        """Send one of those that wait; return the seconds to wait after a fault that may pass."""
        what = "media" if name == ALL_MEDIA else f"checkpoint {name}"
        try:
            self.send(name)
        except Retry as error:
            return self._backoffs[name].wait(error)
        except Refused:
            return REFUSED_SECONDS
        except EndlexError as error:
            say(f"{what} failed: {error}")
        except Exception as error:  # such as a full disk
            say(f"{what} must wait: {type(error).__name__}: {error}")
            return REFUSED_SECONDS
        else:
            self._backoffs.pop(name, None)
            if name != ALL_MEDIA:
                say(f"{what} is published")
        return 0.0


POLL_SECONDS = 0.5
LOCK_SECONDS = 10.0
"""How long a new shipper waits for the one before it to end."""
NICENESS = 10
"""Added to the process's: the trainer comes first."""

SHIPPING, WAITING, FAILED = "shipping", "waiting", "failed"


class Shipper:
    """Ship one run's directory until there is nothing left to wait for.

    Args:
        directory: whose lock the caller holds.
    """

    def __init__(self, directory: Path, transport: Transport, stop: Stop) -> None:
        self._directory, self._owner = directory, require_run_file(directory)
        self._transport, self._stop = transport, stop
        run = self._owner["run"]
        reported = _reported(directory, transport.url)
        self._journals = JournalShipper(directory, run, transport, reported=reported)
        self._checkpoints = CheckpointShipper(directory, run, transport, ready=self._is_known)
        self._system: SystemRecorder | None = None
        self._error: str | None = None
        self._published: tuple[str, dict[str, Any]] = "", {}

    def run(self) -> None:
        """Ship, and return when everything is there, or when asked to stop."""
        self._checkpoints.start()
        backoff = Backoff()
        try:
            while not self._stop.is_set() and self._directory.exists():
                wait = self._step(backoff)
                if wait is None:
                    self._publish(DONE)
                    return
                self._publish(WAITING if self._error else SHIPPING)
                self._stop.wait(wait)
        finally:
            self._end_system()
            self._checkpoints.stop()
            if self._stop.is_set():
                self._publish(STOPPED)

    def _step(self, backoff: Backoff) -> float | None:
        """Do what there is to do, and return how long to wait, or None when all is done."""
        try:
            more = self._journals.tick()
        except Retry as error:
            self._report(str(error))
            return backoff.wait(error)
        backoff.reset()
        self._report(next(iter(self._journals.errors()), None))
        if self._journals.denied:
            self._transport.renew_token(server_token())  # its file may have been rewritten
        self._watch_system()
        if more:
            return 0.0
        is_done = self._system is None and not self._checkpoints.waiting()
        return None if is_done and self._journals.all_done() else POLL_SECONDS

    def _is_known(self) -> bool:
        """Whether the server has a session of the run, so that checkpoints have a place."""
        return any(session.acknowledged for session in list(self._journals.sessions.values()))

    def _watch_system(self) -> None:
        """Measure the machine while a trainer runs, or its checkpoints are still on their way."""
        if self._journals.has_live_trainer():
            if self._system is None:
                with contextlib.suppress(OSError):  # a full disk: the next step tries again
                    self._system = SystemRecorder(
                        self._directory, self._owner, seconds=SAMPLE_SECONDS
                    )
        elif self._system is not None and not self._checkpoints.waiting():
            self._end_system()

    def _end_system(self) -> None:
        if self._system is not None:
            self._system.finish()
            self._system = None

    def _report(self, error: str | None) -> None:
        if error != self._error:
            say(error or "the server answers again")
        self._error = error

    def _publish(self, state: str) -> None:
        content = {
            "url": self._transport.url,
            "error": self._error,
            "sessions": self._journals.states(),
            "checkpoints": self._checkpoints.states(),
        }
        if (state, content) != self._published:
            self._published = state, content
            write_state(self._directory, state, content)


def _reported(directory: Path, url: str) -> list[str]:
    """Return the sessions whose end an earlier shipper reported to the same server."""
    state = read_state(directory)
    if state.get("url") != url:
        return []
    return [name for name, session in state.get("sessions", {}).items() if session.get("done")]


def main(arguments: list[str]) -> int:
    """Ship the directory that is named; the exit status is 1 if that cannot begin."""
    replace_unencodable()  # in the log
    directory = Path(arguments[0])
    url = server_url()
    if url is None:
        say("there is no ENDLEX_URL to send to")
        return 1
    lock = take_lock(directory, BACKGROUND, seconds=LOCK_SECONDS)
    if lock is None:
        return 0  # another one is at work, and finds new sessions by itself
    stop = Stop()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    with holding(lock):
        try:
            Shipper(directory, Transport(url, server_token()), stop).run()
        except EndlexError as error:
            say(str(error))
            write_state(directory, FAILED, {"error": str(error)})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
