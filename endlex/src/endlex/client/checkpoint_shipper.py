"""Staged checkpoints on their way, oldest first, in a thread beside the journals'.

A checkpoint is hashed, sent and, once the server has published it, its links are dropped; the
manifest stays, for `endlex verify`. One that can never be published is reported and kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from endlex.client.backoff import Backoff
from endlex.client.manifests import CheckpointFailed, staged_manifest
from endlex.client.parts import PartSource, Upload
from endlex.client.replacement import drop_replaced
from endlex.client.shipping import say
from endlex.client.staging import read_note, staged_names, unstage
from endlex.client.stopping import Stop
from endlex.client.transport import Refused, Retry, Transport
from endlex.protocol import STAGED_DIR, EndlexError, Manifest

POLL_SECONDS = 0.5
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
        """Whether nothing is staged but what has failed for good."""
        return not self._waiting()

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
            wait = POLL_SECONDS
            if not self._ready():
                continue
            for name in drop_replaced(self._directory):
                self._set(name, "replaced")
            for name in self._waiting():
                wait = self._try(name, backoff)
                if wait or self._stop.is_set():
                    break

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
