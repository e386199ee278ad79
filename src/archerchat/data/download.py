"""Download files: resumable, retried, checked, whole or not at all.

A file arrives in `.<name>.<version>.part`, which a later attempt, or a later process, goes on with.
Only when its size and, where the hub states one, its SHA-256 are right and it opens as what it
should be does it get its name; a file that has its name is therefore never looked at again, and a
repeated command with everything there needs no network.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import get_hf_file_metadata, get_session
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined,unused-ignore]

from archerchat.errors import DataError
from archerchat.files import explained_writes, fsync, fsync_dir, sha256_file

TIMEOUT_SECONDS = 10.0
MAX_DELAY_SECONDS = 30.0
RETRIED_STATUS = {408, 425, 429}
PART = ".part"


@dataclass(frozen=True)
class RetryPolicy:
    """Say how stubborn to be; an attempt that brings new bytes does not count as a failure."""

    attempts: int = 6
    first_delay_seconds: float = 1.0

    def delay(self, failures: int) -> float:
        return min(self.first_delay_seconds * 2.0 ** (failures - 1), MAX_DELAY_SECONDS)


Report = Callable[[str, int, int], None]
"""Learns a file's name, how many bytes of it are here, and its size; from several threads."""

Notify = Callable[[str], None]
"""Learns in words what went wrong and is tried again; from several threads."""


def download_file(
    url: str,
    path: Path,
    check: Callable[[Path], None],
    *,
    without_network: str,
    token: bool | None = False,
    report: Report = lambda name, arrived, size: None,
    notify: Notify = lambda message: None,
    retry: RetryPolicy | None = None,
) -> None:
    """Fetch one file from any server to `path`, unless it is there.

    Args:
        check, without_network, token: as in `Download`; by default the hub's token stays here.

    Raises:
        DataError: it cannot be had; what arrived is kept for the next attempt.
    """
    if path.exists():
        return
    with explained_writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    Download(path, url, check, without_network, report, notify, token).run(retry or RetryPolicy())


class _Stopped(Exception):
    """Another file failed, or the user interrupted."""


class _Damaged(Exception):
    """What arrived is not the file."""


@dataclass
class Download:
    """Fetch one file."""

    path: Path
    url: str
    check: Callable[[Path], None]
    """Raises `DataError` when a complete file is not what it should be."""
    without_network: str
    """Ends the message about a server out of reach."""
    report: Report
    notify: Notify
    token: bool | None = None
    """False keeps the user's token from the server; None leaves it to huggingface_hub."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Ends the download when it is set."""
    _most_arrived: int = field(default=0, init=False)

    def run(self, retry: RetryPolicy) -> None:
        """Try until the file is there or there is no hope."""
        failures = 0
        while True:
            most_arrived = self._most_arrived
            try:
                return self._attempt()
            except (DataError, _Stopped):
                raise
            except Exception as error:  # httpx's or httpx2's, by huggingface_hub's version
                failures = 1 if self._most_arrived > most_arrived else failures + 1
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                self._check_hope(error, reason, failures, retry)
            delay = retry.delay(failures)
            self.notify(f"{self.path.name}: {reason}; trying again in {delay:.0f} s")
            if self.stop.wait(delay):
                raise _Stopped

    def _check_hope(self, error: Exception, reason: str, failures: int, retry: RetryPolicy) -> None:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if 400 <= status < 500 and status not in RETRIED_STATUS:
            raise DataError(
                f"{self.url} answered {status}: check the source's name and --endpoint, and that "
                f"you may read it"
            ) from error
        if failures >= retry.attempts or isinstance(error, OfflineModeIsEnabled):
            raise DataError(
                f"gave up on {self.url} after {failures} attempts ({reason}): check the network "
                f"and run the same command again, it goes on where it stopped. Without a network, "
                f"{self.without_network}"
            ) from error

    def _attempt(self) -> None:
        metadata = get_hf_file_metadata(self.url, timeout=TIMEOUT_SECONDS, token=self.token)
        if metadata.size is None or not metadata.etag:
            raise DataError(f"{self.url} has no size or ETag: is --endpoint a Hugging Face hub?")
        part = self._part(metadata.etag)
        with explained_writes(part), part.open("ab") as file:
            if file.tell() > metadata.size:
                _empty(file)
            self._receive(file, metadata.size)
            fsync(file.fileno())
        self._verify(part, metadata.size, metadata.etag)
        with explained_writes(self.path):
            part.replace(self.path)
            fsync_dir(self.path.parent)

    def _part(self, etag: str) -> Path:
        """Return where this version of the file arrives; parts of other versions are removed."""
        prefix = f".{self.path.name}."
        version = hashlib.sha256(etag.encode()).hexdigest()[:16]
        part = self.path.with_name(f"{prefix}{version}{PART}")
        for other in part.parent.glob(f"{prefix}*{PART}"):
            if other != part:
                other.unlink(missing_ok=True)
        return part

    def _receive(self, file: BinaryIO, size: int) -> None:
        """Append what `file` lacks."""
        self.report(self.path.name, file.tell(), size)
        if file.tell() == size:
            return
        headers = build_hf_headers(token=self.token) | {"Accept-Encoding": "identity"}
        if file.tell():
            headers["Range"] = f"bytes={file.tell()}-"
        with get_session().stream(
            "GET", self.url, headers=headers, follow_redirects=True, timeout=TIMEOUT_SECONDS
        ) as response:
            response.raise_for_status()
            content_range = response.headers.get("Content-Range", "")
            if not content_range.startswith(f"bytes {file.tell()}-"):
                _empty(file)  # the server sends the whole file
            for chunk in response.iter_bytes():
                if self.stop.is_set():
                    raise _Stopped
                file.write(chunk)
                self._most_arrived = max(self._most_arrived, file.tell())
                self.report(self.path.name, file.tell(), size)

    def _verify(self, part: Path, size: int, etag: str) -> None:
        """Check a complete part, and remove it if it is wrong."""
        arrived = part.stat().st_size
        if arrived < size:
            raise _Damaged(f"{arrived} of {size} bytes arrived")  # the next attempt goes on
        try:
            if arrived > size:
                raise _Damaged(f"{arrived} bytes arrived, {size} were announced")
            # A large file's ETag is its SHA-256; another file's says nothing about the content.
            if re.fullmatch(r"[0-9a-f]{64}", etag) and (found := sha256_file(part)) != etag:
                raise _Damaged(f"its SHA-256 is {found}, the hub says {etag}")
            try:
                self.check(part)
            except DataError as error:
                raise _Damaged(str(error)) from error
        except _Damaged:
            part.unlink()
            raise


def _empty(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()
