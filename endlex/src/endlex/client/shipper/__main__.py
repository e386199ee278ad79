"""The shipper: sends what a run's directory holds, outlives the trainer, ends when all is there.

    python -m endlex.client.shipper DIR        with ENDLEX_URL and ENDLEX_TOKEN

`endlex.init` starts it; one serves a directory, by the lock of `shipper.lock`. It looks at the
journals twice a second and sends what is new; after any fault it does the same again, forever, with
growing waits. Checkpoints go in a thread of their own. All that it knows is on the disk or on the
server, so it may be killed at any moment. It ends when every session's writer is gone and
everything is acknowledged; a run that is resumed meanwhile starts another one, which waits for the
lock: what begins before the lock is given up is sent by the old, the rest by the new.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from endlex.client.directories import require_run_file, server_token, server_url
from endlex.client.process import replace_unencodable
from endlex.client.shipper import control
from endlex.client.shipper.send_checkpoints import CheckpointShipper
from endlex.client.shipper.send_journals import JournalShipper
from endlex.client.shipper.system_stats import SystemRecorder
from endlex.client.transport import Backoff, Retry, Transport
from endlex.protocol import EndlexError

JOURNAL_POLL_SECONDS = 0.5
LOCK_SECONDS = 10.0  # how long a new shipper waits for the one before it to end
NICENESS = 10  # added to the process's: the trainer comes first
SHIPPING, WAITING, FAILED = "shipping", "waiting", "failed"


class Shipper:
    """Ship one run's directory, whose lock the caller holds, until nothing is left to wait for."""

    def __init__(self, directory: Path, transport: Transport, stop: threading.Event) -> None:
        self._directory, self._owner = directory, require_run_file(directory)
        self._transport, self._stop = transport, stop
        run = self._owner["run"]
        before = control.read_state(directory)
        known = before.get("sessions", {}) if before.get("url") == transport.url else {}
        reported = [name for name, session in known.items() if session.get("done")]
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
                seconds = self._step(backoff)
                if seconds is None:
                    self._publish(control.DONE)
                    return
                self._publish(WAITING if self._error else SHIPPING)
                self._stop.wait(seconds)
        finally:
            self._end_system()
            self._checkpoints.stop()
            if self._stop.is_set():
                self._publish(control.STOPPED)

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
        return None if is_done and self._journals.all_done() else JOURNAL_POLL_SECONDS

    def _is_known(self) -> bool:
        """Whether the server has a session of the run, so that checkpoints have a place."""
        return any(session.acknowledged for session in list(self._journals.sessions.values()))

    def _watch_system(self) -> None:
        """Measure the machine while a trainer runs, or its checkpoints are still on their way."""
        if self._journals.has_live_trainer():
            if self._system is None:
                with contextlib.suppress(OSError):  # a full disk: the next step tries again
                    self._system = SystemRecorder(self._directory, self._owner)
        elif self._system is not None and not self._checkpoints.waiting():
            self._end_system()

    def _end_system(self) -> None:
        if self._system is not None:
            self._system.finish()
            self._system = None

    def _report(self, error: str | None) -> None:
        if error != self._error:
            control.say(error or "the server answers again")
        self._error = error

    def _publish(self, state: str) -> None:
        content = {
            "url": self._transport.url,
            "error": self._error,
            "sessions": self._journals.states(),
            "checkpoints": self._checkpoints.states.copy(),
        }
        if (state, content) != self._published:
            self._published = state, content
            control.write_state(self._directory, state, content)


def main(arguments: list[str]) -> int:
    """Ship the directory that is named; the exit status is 1 if that cannot begin."""
    replace_unencodable()  # in the log
    directory = Path(arguments[0])
    if (url := server_url()) is None:
        control.say("there is no ENDLEX_URL to send to")
        return 1
    lock = control.take_lock(directory, control.BACKGROUND, seconds=LOCK_SECONDS)
    if lock is None:
        return 0  # another one is at work, and finds new sessions by itself
    stop = threading.Event()

    def stop_on_sigterm() -> None:
        signal.sigwait([signal.SIGTERM])
        stop.set()

    # A handler would run in the main thread, which may hold the lock inside `stop`: a thread of its
    # own waits for the signal instead, which macOS would drop if the trainer ignores it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=stop_on_sigterm, daemon=True).start()
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    with control.holding(lock):
        try:
            Shipper(directory, Transport(url, server_token()), stop).run()
        except EndlexError as error:
            control.say(str(error))
            control.write_state(directory, FAILED, {"error": str(error)})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
