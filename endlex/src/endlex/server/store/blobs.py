"""Parts of checkpoints' files, each stored once under its SHA-256, and those still arriving.

A part arrives in a partial file that only grows, so that an interrupted upload resumes where it
stopped. When its last byte is there the whole file is hashed, put on the disk and renamed to its
place: a part that can be seen is whole and right. An upload takes the memory of one piece, however
large the part.

`lock` is held where somebody asks whether parts are there, and where one is deleted: a part that a
client was just told about, or that a manifest was just accepted for, is not deleted in between.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from endlex.client.process import fsync
from endlex.protocol import MAX_PART_BYTES
from endlex.server.errors import ApiError, disk_full
from endlex.server.settings import DataDir, Settings
from endlex.server.store.database import Pool

PIECE = 2**20
KEPT_SECONDS = 86400.0
"""How long unused and partial parts are kept for a client that may still be sending."""


class Blobs:
    """The parts of one data directory."""

    def __init__(self, settings: Settings, data: DataDir, pool: Pool) -> None:
        self._data, self._pool = data, pool
        self._reserve = settings.reserve(data.root)
        self._uploads: set[str] = set()
        self.lock = threading.Lock()

    def path(self, sha256: str) -> Path:
        """Return the path of a part that is here; `sha256` is checked by the caller."""
        return self._data.parts / sha256[:2] / sha256

    def _partial(self, sha256: str) -> Path:
        return self._data.partial / sha256

    def find_missing(self, asked: Iterable[str]) -> tuple[list[str], dict[str, int]]:
        """Return which parts are not here, and how many bytes of each have come.

        What is here, whole or in part, is kept for another day, since a client counts on it.
        """
        missing, partial = [], {}
        with self.lock:
            for sha256 in dict.fromkeys(asked):
                if _touch(self.path(sha256)) is not None:
                    continue
                missing.append(sha256)
                held = _touch(self._partial(sha256))
                if held:
                    partial[sha256] = held
        return missing, partial

    async def receive(
        self, sha256: str, offset: int, length: int, body: AsyncIterator[bytes]
    ) -> bool:
        """Take a part's bytes from `offset` to its end; return whether it was new.

        `sha256` is a checked digest, and `length` the body's, or 0 if unknown. An `ApiError` is
        400, 409, 413, 429 or 507, as the protocol says; what came stays.
        """
        if await self._pool(_touch, self.path(sha256)) is not None:
            return False
        if sha256 in self._uploads:  # one that stands still is given up by `bodies.iter_body`
            message = f"part {sha256} is being sent by another connection: ask again"
            raise ApiError(429, message, {"Retry-After": "1"})
        self._uploads.add(sha256)
        try:
            held = await self._pool(self._prepare, sha256, length)
            if offset != held:
                message = f"{held} bytes of part {sha256} are here: send from there"
                raise ApiError(409, message, offset=held)
            await self._append(self._partial(sha256), held, length, body)
            await self._pool(self._publish, sha256)
        finally:
            self._uploads.remove(sha256)
        return True

    async def _append(self, path: Path, held: int, length: int, body: AsyncIterator[bytes]) -> None:
        too_long = ApiError(413, f"a part has at most {MAX_PART_BYTES:,} bytes: cut the file finer")
        if held + length > MAX_PART_BYTES:
            raise too_long
        waiting = bytearray()  # a piece that is worth a write
        try:
            async for chunk in body:
                held += len(chunk)
                if held > MAX_PART_BYTES:
                    raise too_long
                waiting += chunk
                if len(waiting) >= PIECE:
                    piece, waiting = waiting, bytearray()
                    await self._pool(_append_to, path, piece)
        finally:  # what came of a broken body stays, too
            if waiting:
                await self._pool(_append_to, path, waiting)

    def _prepare(self, sha256: str, length: int) -> int:
        """Return how many bytes have come; there must be room for the rest."""
        if shutil.disk_usage(self._data.root).free < self._reserve + length:
            raise disk_full()
        return _touch(self._partial(sha256)) or 0

    def _publish(self, sha256: str) -> None:
        """Hash a partial file, and move it to its place or drop it."""
        partial = self._partial(sha256)
        if not partial.exists():
            raise ApiError(400, f"part {sha256} is empty: send its bytes")
        with partial.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                partial.unlink()
                message = f"the bytes have SHA-256 {found}, not {sha256}: send them all again"
                raise ApiError(400, message)
            fsync(file.fileno())
        place = self.path(sha256)
        place.parent.mkdir(exist_ok=True, mode=0o700)
        partial.replace(place)
        directory = os.open(place.parent, os.O_RDONLY)
        try:
            fsync(directory)
        finally:
            os.close(directory)

    def size(self, sha256: str) -> int | None:
        """Return the bytes of a part; None if it is not here."""
        with suppress(FileNotFoundError):
            return self.path(sha256).stat().st_size
        return None

    def read(self, sha256: str, start: int, size: int) -> bytes:
        """Return a stretch of a part's content; an `OSError` if it is not here, or shorter."""
        with self.path(sha256).open("rb") as file:
            file.seek(start)
            content = file.read(size)
        if len(content) != size:
            raise OSError(f"part {sha256} is shorter than it was")
        return content

    def iter_part(self, sha256: str) -> Iterator[bytes]:
        """Yield a part's content in pieces; a `FileNotFoundError` if it is not here."""
        with self.path(sha256).open("rb") as file:
            yield from iter(lambda: file.read(PIECE), b"")

    def drop_decayed(self, sha256: str) -> bool:
        """Delete a part if its bytes have changed on this disk; return whether they had."""
        with self.lock, self.path(sha256).open("rb") as stored:
            decayed = hashlib.file_digest(stored, "sha256").hexdigest() != sha256
            if decayed:
                self.path(sha256).unlink()
        return decayed

    def collect(self, is_used: Callable[[str], bool]) -> None:
        """Delete the parts that are a day old and unused, and partial ones of that age."""
        for path in [*self._data.parts.glob("*/*"), *self._data.partial.iterdir()]:
            with self.lock, suppress(FileNotFoundError):
                is_part = path.parent != self._data.partial
                is_old = time.time() - path.stat().st_mtime >= KEPT_SECONDS
                if is_old and not (is_part and is_used(path.name)):
                    path.unlink()


def _append_to(path: Path, piece: bytearray) -> None:
    with path.open("ab") as file:
        file.write(piece)


def _touch(path: Path) -> int | None:
    """Set a file's time to now and return its size; None when there is none."""
    try:
        os.utime(path)
        return path.stat().st_size
    except FileNotFoundError:
        return None
