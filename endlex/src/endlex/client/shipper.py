"""The shipper: sends what a run's directory holds, outlives the trainer, ends when all is there.

    python -m endlex.client.shipper DIR        with ENDLEX_URL and ENDLEX_TOKEN

`endlex.init` starts it; one serves a directory, by the lock of `shipper.lock`. It looks at the
journals' sizes twice a second and sends what is new from the offset that the server acknowledged;
after any fault it does the same again, forever, with growing waits. Checkpoints go in a thread of
their own, oldest first; one that can never be published is reported and kept. All that it knows is
on the disk or on the server, so it may be killed at any moment. It ends when every session's writer
is gone and everything is acknowledged; a run that goes on meanwhile starts another one, which
waits for the lock: what begins before the lock is given up is sent by the old, the rest by the new.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from endlex.client.checkpoints import drop_replaced, read_note, staged_names, unstage
from endlex.client.journal_sync import JournalShipper
from endlex.client.manifests import CheckpointFailed, staged_manifest
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
from endlex.client.transport import Backoff, Refused, Retry, Transport
from endlex.client.uploads import MediaSource, PartSource, Upload, send_media
from endlex.protocol import STAGED_DIR, EndlexError, Manifest

CHECKPOINT_POLL_SECONDS = 0.5
REFUSED_SECONDS = 30.0


def send_staged(
    directory: Path,
    run: str,
    name: str,
    transport: Transport,
    *,
    progress: Callable[[int, int], None],
    stopped: Callable[[], bool] = lambda: False,
) -> Manifest:
    """Hash a staged checkpoint, send it, and drop its links once it is published.

    Raises:
        CheckpointFailed: it never will be.
        TransportError: not now.
        EndlexError: its note or manifest is damaged.
    """
    manifest = staged_manifest(directory, name)
    note = read_note(directory, name)
    source = PartSource(directory / STAGED_DIR / name, manifest, note)
    upload = Upload(run, manifest, source, transport, progress=progress, stopped=stopped)
    upload.run()
    unstage(directory, name)
    return manifest


class CheckpointShipper:
    """Send what is staged in a run's directory until stopped.

    Args:
        transport: told the server's address and token; each attempt opens its own connections.
        ready: asked whether the server knows the run by now.
    """

    def __init__(
        self,
        directory: Path,
        run: str,
        transport: Transport,
        *,
        ready: Callable[[], bool],
        refused_seconds: float = REFUSED_SECONDS,
    ) -> None:
        self._directory, self._run, self._transport = directory, run, transport
        self._ready, self._patience = ready, refused_seconds
        self._stop = Stop()
        self._lock = threading.Lock()
        self._states: dict[str, dict[str, Any]] = {}
        self._media_error = False
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
        with self._lock:
            return {name: dict(state) for name, state in self._states.items()}

    def is_idle(self) -> bool:
        """Whether nothing waits but what has failed for good."""
        return not self._waiting() and (self._media_error or not list(MediaSource(self._directory)))

    def _waiting(self) -> list[str]:
        with self._lock:
            failed = {n for n, state in self._states.items() if state["state"] == "failed"}
        return [name for name in staged_names(self._directory) if name not in failed]

    def _set(self, name: str, state: str, error: str | None = None, **figures: int) -> None:
        with self._lock:
            old = self._states.get(name, {"done_bytes": 0, "total_bytes": 0})
            self._states[name] = {**old, "state": state, "error": error, **figures}

    def _work(self) -> None:
        backoff = Backoff()
        wait = 0.0
        while not self._stop.wait(wait):
            wait = CHECKPOINT_POLL_SECONDS
            if not self._ready():
                continue
            wait = self._try_media(backoff) or wait
            for name in drop_replaced(self._directory):
                self._set(name, "replaced")
            for name in self._waiting():
                wait = self._try(name, backoff)
                if wait or self._stop.is_set():
                    break

    def _try_media(self, backoff: Backoff) -> float:
        """Send the media that wait; how long to wait before the next attempt."""
        transport = self._transport.another()
        try:
            send_media(self._directory, transport, self._stop.is_set)
        except Retry as error:
            return backoff.wait(error)
        except (EndlexError, OSError) as error:
            if not self._media_error:
                say(f"media cannot be sent: {error}")
            self._media_error = True
            return self._patience
        finally:
            transport.close()
        self._media_error = False
        return 0.0

    def _try(self, name: str, backoff: Backoff) -> float:
        """Send one checkpoint; how long to wait before the next attempt."""

        def progress(done: int, total: int) -> None:
            backoff.reset()
            self._set(name, "sending", done_bytes=done, total_bytes=total)

        transport = self._transport.another()
        self._set(name, "hashing")
        try:
            send_staged(
                self._directory,
                self._run,
                name,
                transport,
                progress=progress,
                stopped=self._stop.is_set,
            )
        except Retry as error:
            self._set(name, "waiting", str(error))
            return backoff.wait(error)
        except CheckpointFailed as error:
            self._fail(name, error)
            return 0.0
        except Refused as error:
            self._set(name, "refused", str(error))
            return self._patience
        except EndlexError as error:
            self._fail(name, error)
            return 0.0
        except Exception as error:  # a full disk, or a fault of ours: neither ends the thread
            self._set(name, "waiting", f"{type(error).__name__}: {error}")
            return self._patience
        finally:
            transport.close()
        self._set(name, "published")
        say(f"checkpoint {name} is published")
        return 0.0

    def _fail(self, name: str, error: Exception) -> None:
        self._set(name, "failed", str(error))
        say(f"checkpoint {name} failed: {error}")


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
        system_seconds: between samples of the machine; None for none.

    Raises:
        EndlexError: the directory is no run's.
    """

    def __init__(
        self,
        directory: Path,
        transport: Transport,
        stop: Stop,
        *,
        poll_seconds: float = POLL_SECONDS,
        system_seconds: float | None = SAMPLE_SECONDS,
    ) -> None:
        owner = require_run_file(directory)
        self._directory, self._owner = directory, owner
        self._transport, self._stop = transport, stop
        self._poll, self._system_seconds = poll_seconds, system_seconds
        self._journals = JournalShipper(
            directory, owner["run"], transport, reported=_reported(directory, transport.url)
        )
        self._checkpoints = CheckpointShipper(
            directory, owner["run"], transport, ready=self._is_known
        )
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
        self._report(next((s.error for s in self._journals.sessions.values() if s.error), None))
        if self._journals.denied:
            self._transport.renew_token(server_token())  # its file may have been written anew
        self._watch_system()
        if more:
            return 0.0
        return None if self._is_done() else self._poll

    def _is_known(self) -> bool:
        """Whether the server has a session of the run, so that checkpoints have a place."""
        return any(s.sync.acknowledged for s in list(self._journals.sessions.values()))

    def _watch_system(self) -> None:
        if self._system_seconds is None:
            return
        if self._journals.has_live_trainer():
            if self._system is None:
                with contextlib.suppress(OSError):  # a full disk: the next step tries again
                    self._system = SystemRecorder(
                        self._directory, self._owner, seconds=self._system_seconds
                    )
        elif self._checkpoints.is_idle():
            self._end_system()

    def _end_system(self) -> None:
        if self._system is not None:
            self._system.finish()
            self._system = None

    def _is_done(self) -> bool:
        sessions = self._journals.sessions
        if self._system is not None or not all(s.done for s in sessions.values()):
            return False
        if not self._checkpoints.is_idle():
            return False
        return self._journals.all_found()

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
    """Sessions of whose end an earlier shipper told the same server."""
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
