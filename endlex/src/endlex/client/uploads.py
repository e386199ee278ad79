"""Checkpoints on their way to the server: hashed in one pass over each file, sent in parts.

The manifest is committed first. The server answers that it is published (then nothing is sent at
all), that it verifies it, or that parts are missing; those go up on two connections, each from
the byte that the server holds. After any fault the same is simply done again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from endlex.client.checkpoints import Staged, read_note
from endlex.client.process import write_whole
from endlex.client.transport import Backoff, Gap, Refused, Retry, Transport, quoted
from endlex.protocol import (
    MANIFEST_DIR,
    MAX_PARTS_ASKED,
    PART_BYTES,
    PROTOCOL,
    STAGED_DIR,
    EndlexError,
    Manifest,
    ManifestFile,
    Part,
    check_manifest,
)

READ_BYTES = 2**20


class CheckpointFailed(EndlexError):
    """This checkpoint cannot be published as it is; trying again does not help."""


class FileChanged(CheckpointFailed):
    """A file is not what it was when it was saved."""


def manifest_path(directory: Path, name: str) -> Path:
    """Where this side keeps what it hashed."""
    return directory / MANIFEST_DIR / f"{name}.json"


def load_manifest(path: Path) -> Manifest | None:
    """A manifest that was kept, or None if there is none.

    Raises:
        EndlexError: it is damaged.
    """
    try:
        return check_manifest(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, EndlexError) as error:
        raise EndlexError(f"{path} is damaged ({error}): delete it, it is made again") from error


def build_manifest(root: Path, note: Staged) -> Manifest:
    """Hash files, in one pass over each.

    Args:
        root: holds them under the paths of the note.

    Raises:
        FileChanged: one is not what the note says.
    """
    files = [
        _hash_file(root / f["path"], f["path"], f["bytes"], f["changed"]) for f in note["files"]
    ]
    return {
        "protocol": PROTOCOL,
        "name": note["name"],
        "step": note["step"],
        "created": note["created"],
        "aliases": note["aliases"],
        "metadata": note["metadata"],
        "files": files,
    }


def _hash_file(path: Path, inside: str, size: int, changed: int) -> ManifestFile:
    whole, parts, held = hashlib.sha256(), [], 0
    with open_unchanged(path, inside, size, changed) as file:
        while held < size:
            part, length = hashlib.sha256(), 0
            while length < PART_BYTES:
                block = file.read(min(READ_BYTES, PART_BYTES - length))
                if not block:
                    break
                part.update(block)
                whole.update(block)
                length += len(block)
            if not length:
                break
            parts.append(Part(sha256=part.hexdigest(), bytes=length))
            held += length
        require_unchanged(file.fileno(), inside, size, changed)
    if held != size:
        raise changed_error(inside)
    return {"path": inside, "bytes": size, "sha256": whole.hexdigest(), "parts": parts}


def open_unchanged(path: Path, inside: str, size: int, changed: int) -> io.FileIO:
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise FileChanged(f"{inside!r} cannot be read ({error}): save it again") from error
    try:
        require_unchanged(file.fileno(), inside, size, changed)
    except BaseException:
        file.close()
        raise
    return file


def require_unchanged(descriptor: int, inside: str, size: int, changed: int) -> None:
    status = os.fstat(descriptor)
    if (status.st_size, status.st_mtime_ns) != (size, changed):
        raise changed_error(inside)


def changed_error(inside: str) -> FileChanged:
    """What to say of a file that was rewritten."""
    return FileChanged(
        f"file changed: {inside!r} was rewritten in place after it was saved; write checkpoints "
        "under a temporary name and rename them, and save this one again"
    )


def staged_manifest(directory: Path, name: str) -> Manifest:
    """The manifest of a staged checkpoint, made and kept when it is first asked for.

    Raises:
        FileChanged: a file is not what it was when it was saved.
        EndlexError: the note of the checkpoint is damaged.
    """
    path = manifest_path(directory, name)
    try:
        kept = load_manifest(path)
    except EndlexError:
        kept = None
    if kept is not None:
        return kept
    manifest = build_manifest(directory / STAGED_DIR / name, read_note(directory, name))
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(manifest).encode())
    return manifest


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


class Upload:
    """One checkpoint on its way to the server; `run` may be called again after any fault.

    Args:
        stopped: asked between requests; when true, the upload ends with a `Retry`.
    """

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
        self._where = quoted("runs", run, "checkpoints", manifest["name"])
        self._manifest, self._source, self._transport = manifest, source, transport
        self._progress, self._stopped = progress, stopped
        self._total = sum(source.size(sha256) for sha256 in source)
        self._held = 0
        self._lock = threading.Lock()
        self.bytes_sent = 0
        """Of parts, over the network, those that arrived in vain included."""

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
            missing, partial = self._ask()
            with self._lock:
                self._held = self._total - sum(map(self._source.size, missing))
                self._held += sum(partial.values())
            self._progress(self._held, self._total)
            self._send_all(missing, partial)
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
