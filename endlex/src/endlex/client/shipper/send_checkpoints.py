"""Send checkpoints and media: hash them, send what the server lacks, publish them.

A checkpoint's manifest is committed first. The server answers that it is published, that it
verifies it, or that parts are missing; those go up on two connections, each from the byte that the
server holds. `Uploader` does not wait after a fault: its caller does, and calls again, which sends
only the rest. `CheckpointShipper` is such a caller, in a thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from endlex.client import checkpoints
from endlex.client.checkpoints import CheckpointFailed, Staged, StagedFile
from endlex.client.shipper.control import say
from endlex.client.transport import REFUSED_SECONDS, Backoff, Refused, Retry, Transport, quoted
from endlex.protocol import MAX_PARTS_ASKED, MEDIA_DIR, STAGED_DIR, EndlexError, Manifest

CONNECTIONS = 2
ROUNDS = 5  # times that missing parts are sent before that counts as a fault
VERIFY_SECONDS = (0.05, 2.0)  # first and longest wait while the server verifies a checkpoint
STAGED_POLL_SECONDS = 0.5
STOP_SECONDS = 2.0
ALL_MEDIA = "media/"  # all waiting media, among the checkpoints, whose names have no slash

T = TypeVar("T")
Progress = Callable[[int, int], None]  # called with the bytes that have arrived, and all bytes


class _Place(NamedTuple):
    root: Path
    file: StagedFile
    offset: int
    length: int


@dataclass(frozen=True)
class Uploader:
    """Send checkpoints and media through a transport; what the server has is not sent again."""

    transport: Transport
    progress: Progress = lambda done, total: None
    stopped: Callable[[], bool] = lambda: False
    """Asked between requests; when true, an upload ends with a `Retry`."""

    def send_staged(self, directory: Path, run: str, name: str) -> None:
        """Hash a staged checkpoint, publish it (see there), and then drop its files here."""
        note = checkpoints.read_note(directory, name)
        manifest = checkpoints.staged_manifest(directory, note)
        self.publish(run, manifest, directory / STAGED_DIR / name, note)
        checkpoints.unstage(directory, name)

    def publish(self, run: str, manifest: Manifest, root: Path, note: Staged) -> None:
        """Send what the server lacks of a checkpoint, and return when it is published there.

        The files below `root` must still be what the note says. It raises `CheckpointFailed` if it
        can never be published, `Retry` if not now, and `Refused` if the token does not allow it or
        the server does not know the run.
        """
        files = {file["path"]: file for file in note["files"]}
        places = dict[str, _Place]()
        for file in manifest["files"]:
            offset = 0
            for part in file["parts"]:
                place = _Place(root, files[file["path"]], offset, part["bytes"])
                places.setdefault(part["sha256"], place)
                offset += part["bytes"]
        for _ in range(ROUNDS):
            if self._commit(run, manifest):
                total = sum(place.length for place in places.values())
                self.progress(total, total)
                return
            self._send_parts(places)
        raise Retry(f"{self.transport.url} says again and again that parts are missing")

    def _commit(self, run: str, manifest: Manifest) -> bool:
        """Send the manifest; return whether it is published now, or parts are missing."""
        where = quoted("runs", run, "checkpoints", manifest["name"])
        seconds, longest = VERIFY_SECONDS
        while True:
            try:
                answer = self.transport.request("PUT", where, json_body=manifest)
            except Refused as error:
                if error.content.get("state") == "incomplete":
                    return False
                if error.status in (409, 413, 422):
                    raise CheckpointFailed(str(error)) from error
                raise
            state = answer.content.get("state") if isinstance(answer.content, dict) else None
            if state == "published":
                return True
            if state != "verifying":
                raise self.transport.ill_answer()
            self._check_going()
            time.sleep(seconds)
            seconds = min(seconds * 2, longest)

    def _check_going(self) -> None:
        if self.stopped():
            raise Retry("the upload was stopped")

    def _send_parts(self, places: Mapping[str, _Place], damaged: set[str] | None = None) -> None:
        """Send the parts that the server lacks; one that changed is a failure, or is `damaged`."""
        missing, partial = missing_parts(self.transport, list(places))
        total = sum(place.length for place in places.values())
        held = total - sum(places[sha256].length for sha256 in missing) + sum(partial.values())
        self.progress(held, total)
        lock = threading.Lock()

        def send(sha256: str) -> None:
            nonlocal held
            self._check_going()
            start = partial.get(sha256, 0)
            try:
                self._send_part(sha256, places[sha256], start)
            except CheckpointFailed:
                if damaged is None:
                    raise
                damaged.add(sha256)
            with lock:
                held += places[sha256].length - start
                self.progress(held, total)

        in_parallel(send, missing, CONNECTIONS, self.transport)

    def _send_part(self, sha256: str, place: _Place, start: int) -> None:
        with checkpoints.open_unchanged(place.root, place.file) as file:
            file.seek(place.offset)
            content = file.read(place.length)
        where, headers = quoted("parts", sha256), {"Content-Type": "application/octet-stream"}
        # All of it may be held and not taken yet: then nothing but the offset is sent.
        rest, query = memoryview(content)[start:], {"offset": start}
        try:
            self.transport.request("PUT", where, query=query, body=rest, headers=headers)
        except Refused as error:
            if error.status not in (400, 409):
                raise
            if hashlib.sha256(content).hexdigest() != sha256:
                raise checkpoints.FileChanged(place.file["path"]) from error
            raise Retry(str(error)) from error  # damaged on the way, or from another offset

    def send_media(self, directory: Path) -> None:
        """Send the media that wait in a run's directory.

        Those that were damaged here are put aside; then `CheckpointFailed` names them.
        """
        folder, places, damaged = directory / MEDIA_DIR, dict[str, _Place](), set[str]()
        for name in checkpoints.waiting_media(directory):
            file = checkpoints.describe_file(name, (folder / name).stat())
            places[name] = _Place(folder, file, 0, file["bytes"])
        self._send_parts(places, damaged)
        aside = {name: folder / f"{name}{checkpoints.DAMAGED}" for name in sorted(damaged)}
        for name in places:
            with contextlib.suppress(OSError):  # a directory that can only be read
                if name in aside:
                    (folder / name).rename(aside[name])
                else:
                    (folder / name).unlink()
        if aside:
            shown = ", ".join(map(str, aside.values()))
            raise CheckpointFailed(f"a logged file was damaged before it was sent: {shown}")


def missing_parts(transport: Transport, parts: list[str]) -> tuple[list[str], dict[str, int]]:
    """Ask which of these parts the server lacks, and how many bytes it holds of those."""
    missing, partial = list[str](), dict[str, int]()
    for start in range(0, len(parts), MAX_PARTS_ASKED):
        asked = parts[start : start + MAX_PARTS_ASKED]
        answer = transport.request("POST", "/parts/missing", json_body={"parts": asked})
        try:
            lacks = set(answer.content["missing"])
            partial |= {str(k): int(v) for k, v in answer.content.get("partial", {}).items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise transport.ill_answer() from error
        missing += [part for part in asked if part in lacks]
    return missing, partial


def in_parallel(
    act: Callable[[T], None], items: Sequence[T], threads: int, transport: Transport
) -> None:
    """Act on each item, several at a time in threads; the first fault ends all, and is raised."""
    left = iter(items)

    def work() -> None:
        with contextlib.closing(transport):  # this thread's connection
            for item in left:  # shared by the threads
                act(item)

    with ThreadPoolExecutor(threads) as pool:
        try:
            works = [pool.submit(work) for _ in range(min(threads, len(items)))]
            wait(works, return_when=FIRST_EXCEPTION)
        finally:  # after a fault, or at Ctrl-C: the others find nothing left
            list(left)
    failed = [error for one in works if (error := one.exception())]
    if failed:
        raise next((error for error in failed if not isinstance(error, Retry)), failed[0])


class CheckpointShipper:
    """Send the checkpoints and media that wait in a run's directory.

    `send` sends one; `start` sends all that comes, in a thread, until `stop`, once `ready` says
    that the server knows the run.
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
        self._ready, self._stop = ready, threading.Event()
        self._backoffs = defaultdict[str, Backoff](Backoff)
        self._media_at = 0.0  # when media may be tried again: their faults hold up no checkpoint
        self.states = dict[str, dict[str, Any]]()
        """By checkpoint: `state`, `done_bytes`, `total_bytes` and `error`."""
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self.start = self._thread.start

    def stop(self) -> None:
        """End, and leave a request behind that takes long."""
        self._stop.set()
        self._thread.join(STOP_SECONDS)

    def waiting(self) -> list[str]:
        """Return what is here and may be sent: `ALL_MEDIA`, and checkpoints, oldest first."""
        failed = {name for name, state in self.states.copy().items() if state["state"] == "failed"}
        names = [n for n in checkpoints.staged_names(self._directory) if n not in failed]
        return [ALL_MEDIA, *names] if checkpoints.waiting_media(self._directory) else names

    def errors(self) -> list[str]:
        """Return what keeps checkpoints and media from being sent."""
        return [f"{_what(name)}: {s['error']}" for name, s in self.states.items() if s["error"]]

    def _set(self, name: str, state: str, error: str | None = None, **figures: int) -> None:
        old = self.states.get(name, {"done_bytes": 0, "total_bytes": 0})
        self.states[name] = {**old, "state": state, "error": error, **figures}

    def send(self, name: str, progress: Progress = lambda done, total: None) -> None:
        """Send one of those that wait, and note how that went.

        A `TransportError` or `OSError` may pass. It can never be sent after another `EndlexError`:
        a `CheckpointFailed` if that is due to its files.
        """

        def note(done: int, total: int) -> None:
            if done > self.states[name]["done_bytes"]:
                self._backoffs[name].reset()
            self._set(name, "sending", done_bytes=done, total_bytes=total)
            progress(done, total)

        uploader = Uploader(self._transport, note, self._stop.is_set)
        self._set(name, "hashing")
        try:
            if name == ALL_MEDIA:
                uploader.send_media(self._directory)
            else:
                uploader.send_staged(self._directory, self._run, name)
        except EndlexError as error:
            state = "waiting" if isinstance(error, Retry) else "failed"
            self._set(name, "refused" if isinstance(error, Refused) else state, str(error))
            raise
        except Exception as error:  # a full disk, or a fault of ours
            self._set(name, "waiting", f"{type(error).__name__}: {error}")
            raise
        self._set(name, "published")

    def _work(self) -> None:
        seconds = 0.0
        while not self._stop.wait(seconds):
            try:
                seconds = self._send_waiting() if self._ready() else STAGED_POLL_SECONDS
            except Exception as error:  # such as a full disk: nothing ends the thread
                say(f"checkpoints wait: {type(error).__name__}: {error}")
                seconds = REFUSED_SECONDS
        self._transport.close()

    def _send_waiting(self) -> float:
        """Send what waits; return the seconds until the next look."""
        for name in checkpoints.drop_replaced(self._directory):
            self._set(name, "replaced")
        for name in self.waiting():
            if self._stop.is_set() or (name == ALL_MEDIA and time.monotonic() < self._media_at):
                continue
            seconds = self._attempt(name)
            if name == ALL_MEDIA:
                self._media_at = time.monotonic() + seconds
            elif seconds:
                return seconds
        return STAGED_POLL_SECONDS

    def _attempt(self, name: str) -> float:
        """Send one of those that wait; return the seconds to wait after a fault that may pass."""
        try:
            self.send(name)
        except Retry as error:
            return self._backoffs[name].wait(error)
        except Refused:
            return REFUSED_SECONDS
        except EndlexError as error:
            say(f"{_what(name)} failed: {error}")
            return 0.0
        except Exception as error:  # such as a full disk
            say(f"{_what(name)} must wait: {type(error).__name__}: {error}")
            return REFUSED_SECONDS
        self._backoffs.pop(name, None)
        if name != ALL_MEDIA:
            say(f"{_what(name)} is published")
        return 0.0


def _what(name: str) -> str:
    return "media" if name == ALL_MEDIA else f"checkpoint {name}"
