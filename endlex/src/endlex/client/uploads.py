"""Checkpoints and media on their way to the server: hash them, send what it lacks, publish them.

A checkpoint's manifest is committed first. The server answers that it is published (then nothing is
sent at all), that it verifies it, or that parts are missing; those go up on two connections, each
from the byte that the server holds. Nothing here waits after a fault: the caller does, and calls
again, which sends only the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from endlex.client.checkpoints import (
    DAMAGED,
    Staged,
    StagedFile,
    load_manifest,
    manifest_path,
    read_note,
    unstage,
    waiting_media,
)
from endlex.client.process import READ_ONLY, write_whole
from endlex.client.transport import Refused, Retry, Transport, quoted
from endlex.protocol import (
    MAX_PARTS_ASKED,
    MEDIA_DIR,
    PART_BYTES,
    PROTOCOL,
    STAGED_DIR,
    EndlexError,
    Manifest,
    ManifestFile,
    Part,
)

CONNECTIONS = 2
ROUNDS = 5
"""Times that missing parts are sent before that counts as a fault."""
VERIFY_SECONDS = (0.05, 2.0)
"""First and longest wait between questions whether the server has verified a checkpoint."""

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with the number of bytes that have arrived, and of all bytes."""


class CheckpointFailed(EndlexError):
    """This checkpoint cannot be published as it is; trying again does not help."""


class FileChanged(CheckpointFailed):
    """A file is not what it was when it was saved."""

    def __init__(self, inside: str) -> None:
        super().__init__(
            f"file changed: {inside!r} was rewritten in place after it was saved; write "
            "checkpoints under a temporary name and rename them, and save this one again"
        )


@contextlib.contextmanager
def _open_unchanged(root: Path, file: StagedFile) -> Iterator[BinaryIO]:
    """Open a file, and check before and after the block that it is what the note says."""

    def check() -> None:
        status = os.fstat(content.fileno())
        if (status.st_size, status.st_mtime_ns) != (file["bytes"], file["changed"]):
            raise FileChanged(file["path"])

    try:
        content = (root / file["path"]).open("rb")
    except OSError as error:
        message = f"{file['path']!r} cannot be read ({error}): save it again"
        raise CheckpointFailed(message) from error
    with content:
        check()
        yield content
        check()


def build_manifest(root: Path, note: Staged) -> Manifest:
    """Hash a checkpoint's files, whole and in parts, reading each once.

    Args:
        root: holds them under the paths of the note.
    """
    return {
        "protocol": PROTOCOL,
        "name": note["name"],
        "step": note["step"],
        "created": note["created"],
        "aliases": note["aliases"],
        "metadata": note["metadata"],
        "files": [_hash_file(root, file) for file in note["files"]],
    }


def _hash_file(root: Path, file: StagedFile) -> ManifestFile:
    whole, parts = hashlib.sha256(), list[Part]()
    with _open_unchanged(root, file) as content:
        while part := content.read(PART_BYTES):
            whole.update(part)
            parts.append({"sha256": hashlib.sha256(part).hexdigest(), "bytes": len(part)})
    if sum(part["bytes"] for part in parts) != file["bytes"]:
        raise FileChanged(file["path"])
    hashed = whole.hexdigest()
    return {"path": file["path"], "bytes": file["bytes"], "sha256": hashed, "parts": parts}


def staged_manifest(directory: Path, note: Staged) -> Manifest:
    """Return the manifest of a staged checkpoint; it is made and kept when it is first needed."""
    with contextlib.suppress(EndlexError):  # a damaged one is made again
        if (kept := load_manifest(directory, note["name"])) is not None:
            return kept
    manifest = build_manifest(directory / STAGED_DIR / note["name"], note)
    path = manifest_path(directory, note["name"])
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(manifest).encode())
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
    return manifest


@dataclass(frozen=True)
class _Place:
    """Where a part is on the disk."""

    root: Path
    file: StagedFile
    offset: int
    length: int

    def read(self) -> bytes:
        with _open_unchanged(self.root, self.file) as content:
            content.seek(self.offset)
            return content.read(self.length)


@dataclass(frozen=True)
class Uploader:
    """Send checkpoints and media through a transport; what the server has is not sent again.

    Args:
        progress: told how far each of them is.
        stopped: asked between requests; when true, an upload ends with a `Retry`.
    """

    transport: Transport
    progress: Progress = lambda done, total: None
    stopped: Callable[[], bool] = lambda: False

    def send_staged(self, directory: Path, run: str, name: str) -> None:
        """Hash a staged checkpoint, publish it (see there), and then drop its files here."""
        note = read_note(directory, name)
        manifest, root = staged_manifest(directory, note), directory / STAGED_DIR / name
        self.publish(run, manifest, root, note)
        unstage(directory, name)

    def publish(self, run: str, manifest: Manifest, root: Path, note: Staged) -> None:
        """Send what the server lacks of a checkpoint, and return when it is published there.

        Args:
            root: holds the files.
            note: what they were, so that a change is noticed before it is sent.

        Raises:
            CheckpointFailed: it can never be published.
            Retry: not now.
            Refused: the token does not allow it, or the server does not know the run.
        """
        files = {file["path"]: file for file in note["files"]}
        places: dict[str, _Place] = {}
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
        wait, longest = VERIFY_SECONDS
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
            time.sleep(wait)
            wait = min(wait * 2, longest)

    def _check_going(self) -> None:
        if self.stopped():
            raise Retry("the upload was stopped")

    def _send_parts(self, places: Mapping[str, _Place], damaged: set[str] | None = None) -> None:
        """Send the parts that the server lacks.

        Args:
            damaged: takes the parts whose files are not what they were, instead of a failure.
        """
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
                _send_part(sha256, places[sha256], start, self.transport)
            except CheckpointFailed:
                if damaged is None:
                    raise
                damaged.add(sha256)
            with lock:
                held += places[sha256].length - start
                self.progress(held, total)

        in_parallel(send, missing, CONNECTIONS, self.transport)

    def send_media(self, directory: Path) -> None:
        """Send the media that wait in a run's directory.

        Raises:
            CheckpointFailed: a logged file was damaged before it was sent. It is put aside, and the
                others are sent first.
        """
        folder, places = directory / MEDIA_DIR, dict[str, _Place]()
        for name in waiting_media(directory):
            status = (folder / name).stat()
            size, changed = status.st_size, status.st_mtime_ns
            places[name] = _Place(
                folder, {"path": name, "bytes": size, "changed": changed}, 0, size
            )
        damaged = set[str]()
        self._send_parts(places, damaged)
        for name in places:
            with contextlib.suppress(OSError):  # a directory that can only be read
                if name in damaged:
                    (folder / name).rename(folder / f"{name}{DAMAGED}")
                else:
                    (folder / name).unlink()
        if damaged:
            shown = ", ".join(str(folder / f"{name}{DAMAGED}") for name in sorted(damaged))
            raise CheckpointFailed(f"a logged file was damaged before it was sent: {shown}")


def _send_part(sha256: str, place: _Place, start: int, transport: Transport) -> None:
    content = place.read()
    try:
        # All of it may be held and not taken yet: then nothing but the offset is sent.
        transport.request(
            "PUT",
            quoted("parts", sha256),
            query={"offset": start},
            body=memoryview(content)[start:],
            headers={"Content-Type": "application/octet-stream"},
        )
    except Refused as error:
        if error.status not in (400, 409):
            raise
        if hashlib.sha256(content).hexdigest() != sha256:
            raise FileChanged(place.file["path"]) from error
        raise Retry(str(error)) from error  # damaged on the way, or from another offset


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
    act: Callable[[T], None], items: Iterable[T], connections: int, transport: Transport
) -> None:
    """Act on each item, several at a time in threads; the first fault ends all, and is raised.

    Args:
        transport: what `act` asks; each thread's connection is closed at its end.
    """
    waiting, failed = deque(items), list[BaseException]()

    def work() -> None:
        try:
            while not failed:
                try:
                    item = waiting.popleft()
                except IndexError:  # nothing is left
                    return
                act(item)
        except BaseException as error:
            failed.append(error)
        finally:
            transport.close()

    with ThreadPoolExecutor(connections) as pool:
        try:
            for job in [pool.submit(work) for _ in range(min(connections, len(waiting)))]:
                job.result()
        except BaseException as error:  # such as Ctrl-C
            failed.append(error)
    if failed:
        raise next((error for error in failed if not isinstance(error, Retry)), failed[0])
