"""Parts of checkpoints and media on their way to the server, as far as it lacks them.

A checkpoint's manifest is committed first. The server answers that it is published (then nothing is
sent at all), that it verifies it, or that parts are missing; those go up on two connections, each
from the byte that the server holds. After any fault the same is simply done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from endlex.client.checkpoints import Staged
from endlex.client.manifests import (
    CheckpointFailed,
    FileChanged,
    changed_error,
    open_unchanged,
    require_unchanged,
)
from endlex.client.transport import Backoff, Gap, Refused, Retry, Transport, quoted
from endlex.protocol import (
    MAX_PARTS_ASKED,
    MEDIA_DIR,
    SHA256,
    Manifest,
)

CONNECTIONS = 2
ATTEMPTS = 5
"""On one part, before the whole is tried again later."""
ROUNDS = 5
"""Of sending what the server says it lacks, before that counts as a fault."""
VERIFY_SECONDS = (0.05, 2.0)
"""First and longest wait between questions whether the server has verified a checkpoint."""

Progress = Callable[[int, int], None]
"""Told the bytes that the server has, and all of them."""


def _nothing(done: int, total: int) -> None:
    """Report no progress."""


class PartSource:
    """Where on the disk each part of a checkpoint is.

    Args:
        root: holds the manifest's files.
        note: what they were, so that a change is noticed before it is sent.
    """

    def __init__(self, root: Path, manifest: Manifest, note: Staged) -> None:
        self._root = root
        self._was = {file["path"]: (file["bytes"], file["changed"]) for file in note["files"]}
        self._places: dict[str, tuple[str, int, int]] = {}
        for file in manifest["files"]:
            offset = 0
            for part in file["parts"]:
                self._places.setdefault(part["sha256"], (file["path"], offset, part["bytes"]))
                offset += part["bytes"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def size(self, sha256: str) -> int:
        """Bytes of one part."""
        return self._places[sha256][2]

    def read(self, sha256: str) -> bytes:
        """A part's bytes.

        Raises:
            FileChanged: its file is not what it was.
        """
        inside, offset, length = self._places[sha256]
        with open_unchanged(self._root / inside, inside, *self._was[inside]) as file:
            file.seek(offset)
            content = bytearray()
            while len(content) < length and (block := file.read(length - len(content))):
                content += block
            require_unchanged(file.fileno(), inside, *self._was[inside])
        if len(content) != length:
            raise changed_error(inside)
        return bytes(content)

    def require_intact(self, sha256: str, content: bytes) -> None:
        """Raise a `FileChanged` if this is not the part's content."""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise changed_error(self._places[sha256][0])


class MediaSource:
    """The parts of media that wait in a run's directory."""

    def __init__(self, directory: Path) -> None:
        self._folder = directory / MEDIA_DIR

    def __iter__(self) -> Iterator[str]:
        return (path.name for path in self._folder.glob("*") if SHA256.fullmatch(path.name))

    def size(self, sha256: str) -> int:
        """Bytes of one part."""
        return (self._folder / sha256).stat().st_size

    def read(self, sha256: str) -> bytes:
        """A part's bytes."""
        return (self._folder / sha256).read_bytes()

    def require_intact(self, sha256: str, content: bytes) -> None:
        """Raise a `FileChanged` if this is not the part's content."""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise FileChanged(f"{self._folder / sha256} was altered: log the file again")

    def drop(self, sha256: str) -> None:
        """The server has it."""
        with contextlib.suppress(OSError):  # a directory that can only be read
            (self._folder / sha256).unlink()


class PartUpload:
    """Parts on their way to the server; sending may be repeated after any fault.

    Args:
        stopped: asked between requests; when true, the upload ends with a `Retry`.
    """

    def __init__(
        self,
        source: PartSource | MediaSource,
        transport: Transport,
        *,
        progress: Progress = _nothing,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._source, self._transport = source, transport
        self._progress, self._stopped = progress, stopped
        self._total = sum(source.size(sha256) for sha256 in source)
        self._held = 0
        self._lock = threading.Lock()
        self.bytes_sent = 0
        """Of parts, over the network, those that arrived in vain included."""

    def send_missing(self) -> None:
        """Send what the server lacks.

        Raises:
            TransportError: not all of it, now.
            FileChanged: a part is not what it was.
        """
        missing, partial = self._ask()
        with self._lock:
            self._held = self._total - sum(map(self._source.size, missing))
            self._held += sum(partial.values())
        self._progress(self._held, self._total)
        self._send_all(missing, partial)

    def _ask(self) -> tuple[list[str], dict[str, int]]:
        """The parts that the server lacks, and how many bytes it has of some of them."""
        asked, missing, partial = list(self._source), list[str](), dict[str, int]()
        for start in range(0, len(asked), MAX_PARTS_ASKED):
            lacks, holds = missing_parts(self._transport, asked[start : start + MAX_PARTS_ASKED])
            missing += lacks
            partial |= holds
        return missing, partial

    def _send_all(self, missing: list[str], partial: Mapping[str, int]) -> None:
        connections = min(CONNECTIONS, len(missing))
        if not connections:
            return
        waiting = iter(missing)
        failed: list[BaseException] = []

        def work() -> None:
            transport = self._transport.another()
            try:
                while not failed:
                    with self._lock:
                        sha256 = next(waiting, None)
                    if sha256 is None:
                        return
                    self._send(transport, sha256, partial.get(sha256, 0))
            except BaseException as error:
                failed.append(error)
            finally:
                transport.close()

        with ThreadPoolExecutor(connections) as pool:
            for _ in range(connections):
                pool.submit(work)
        if failed:
            raise next((e for e in failed if not isinstance(e, Retry)), failed[0])

    def _send(self, transport: Transport, sha256: str, held: int) -> None:
        content, backoff, counted = self._source.read(sha256), Backoff(), held
        for attempt in range(ATTEMPTS):
            self._require_going()
            try:
                if attempt:
                    lacks, holds = missing_parts(transport, [sha256])
                    held = holds.get(sha256, 0)
                    if not lacks:
                        break
                # All of it may be held and not taken yet: then nothing but the offset is sent.
                self._put(transport, sha256, content, held)
                break
            except Gap as error:
                if attempt == ATTEMPTS - 1:
                    raise Retry(str(error)) from error
            except Refused as error:
                if error.status != 400:
                    raise
                self._source.require_intact(sha256, content)  # damaged here, or on the way?
                if attempt == ATTEMPTS - 1:
                    raise Retry(str(error)) from error
            except Retry as error:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(backoff.wait(error))
        with self._lock:
            self._held += len(content) - counted
            done = min(self._held, self._total)
        self._progress(done, self._total)

    def _put(self, transport: Transport, sha256: str, content: bytes, held: int) -> None:
        with self._lock:
            self.bytes_sent += max(len(content) - held, 0)
        body = memoryview(content)[min(held, len(content)) :]
        where = quoted("parts", sha256)
        transport.request(
            "PUT",
            where,
            query={"offset": held},
            body=body,
            headers={"Content-Type": "application/octet-stream"},
        )

    def _require_going(self) -> None:
        if self._stopped():
            raise Retry("the upload was stopped")


class Upload(PartUpload):
    """One checkpoint on its way; `run` may be called again after any fault."""

    def __init__(
        self,
        run: str,
        manifest: Manifest,
        source: PartSource,
        transport: Transport,
        *,
        progress: Progress = _nothing,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(source, transport, progress=progress, stopped=stopped)
        self._where = quoted("runs", run, "checkpoints", manifest["name"])
        self._manifest = manifest

    def run(self) -> None:
        """Send what the server lacks, and return when it has published the checkpoint.

        Raises:
            CheckpointFailed: it never will.
            Retry: not now.
            Refused: the token does not allow it, or the server does not know the run.
        """
        for _ in range(ROUNDS):
            if self._commit():
                self._progress(self._total, self._total)
                return
            self.send_missing()
        raise Retry(f"{self._transport.url} says again and again that parts are missing")

    def _commit(self) -> bool:
        """Send the manifest; whether it is published now, or parts are missing."""
        wait, longest = VERIFY_SECONDS
        while True:
            try:
                answer = self._transport.request("PUT", self._where, json_body=self._manifest)
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
                raise self._transport.ill_answer()
            self._require_going()
            time.sleep(wait)
            wait = min(wait * 2, longest)


def missing_parts(transport: Transport, parts: list[str]) -> tuple[list[str], dict[str, int]]:
    """Ask which of these parts the server lacks, and how many bytes it holds of those.

    Raises:
        TransportError: it does not say.
    """
    answer = transport.request("POST", "/parts/missing", json_body={"parts": parts})
    try:
        lacks = set(answer.content["missing"])
        partial = {str(k): int(v) for k, v in answer.content.get("partial", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise transport.ill_answer() from error
    return [part for part in parts if part in lacks], partial


def send_media(
    directory: Path, transport: Transport, stopped: Callable[[], bool] = lambda: False
) -> int:
    """Send the media that wait in a run's directory, and return how many parts there were.

    Raises:
        TransportError: not now.
        FileChanged: a part was altered here.
    """
    source = MediaSource(directory)
    waiting = list(source)
    if waiting:
        PartUpload(source, transport, stopped=stopped).send_missing()
    for sha256 in waiting:
        source.drop(sha256)
    return len(waiting)
