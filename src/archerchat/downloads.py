"""Download files from the Hugging Face hub and other servers; each appears complete or not at all.

A file arrives in `.<name>.<version>.part`, which a later attempt or a later process continues. It
is renamed when its size, its SHA-256 (if the server states one) and its format are right. A file
under its own name is therefore never checked again, and a command that finds all of its files
needs no network.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from archerchat.errors import DataError, UsageError
from archerchat.files import explained_writes, fsync, fsync_path, sha256_file

TIMEOUT_SECONDS = 10.0
ATTEMPTS = 6
"""Failures in a row until a download is given up. New bytes reset the count."""
FIRST_DELAY_SECONDS = 1.0
"""Doubled after each failure, up to `MAX_DELAY_SECONDS`."""
MAX_DELAY_SECONDS = 30.0
RETRIED_STATUS = {408, 425, 429}

Check = Callable[[Path], object]
"""Raises a DataError, OSError or ValueError if a complete file is not what it should be."""
Report = Callable[[str, int, int], None]
"""Receives a file's name, its bytes so far, and its size; called from several threads."""
Notify = Callable[[str], None]
"""Receives a sentence about what failed and is tried again; called from several threads."""


class _Stopped(Exception):
    """Another file failed, or the user interrupted."""


class _Damaged(Exception):
    """What arrived is not the file."""


def download_file(
    url: str,
    path: Path,
    check: Check,
    *,
    without_network: str,
    token: bool | None = False,
    report: Report = lambda name, arrived, size: None,
    notify: Notify = lambda message: None,
    stop: threading.Event | None = None,
) -> None:
    """Fetch one file to `path`, unless it is there.

    Args:
        without_network: what to do if the server cannot be reached; the end of the error message.
        token: False keeps the user's token from the server; None leaves it to huggingface_hub.
        stop: ends the download when it is set.

    Raises:
        DataError: the download failed; what arrived is kept for the next attempt.
    """
    if path.exists():
        return
    stop, failures, most_arrived = stop or threading.Event(), 0, 0

    def note(arrived: int, size: int) -> None:
        nonlocal failures, most_arrived
        if arrived > most_arrived:
            failures, most_arrived = 0, arrived
        report(path.name, arrived, size)
        if stop.is_set():
            raise _Stopped

    while True:
        try:
            return _attempt(url, path, check, token, note)
        except (DataError, _Stopped):
            raise
        except Exception as error:  # httpx's or httpx2's, by huggingface_hub's version
            failures += 1
            reason = _check_retry(url, error, failures, without_network)
        delay = min(FIRST_DELAY_SECONDS * 2.0 ** (failures - 1), MAX_DELAY_SECONDS)
        notify(f"{path.name}: {reason}; trying again in {delay:.0f} s")
        if stop.wait(delay):
            raise _Stopped


def _check_retry(url: str, error: Exception, failures: int, without_network: str) -> str:
    """Return the reason of a failed attempt; raise a DataError if another would be useless."""
    status, reason = _parts_of(error)
    if 400 <= status < 500 and status not in RETRIED_STATUS:
        advice = "check the source's name, --endpoint, and your right to read it"
        raise DataError(f"{url} answered {status}: {advice}") from error
    if failures >= ATTEMPTS or type(error).__name__ == "OfflineModeIsEnabled":
        raise DataError(
            f"gave up on {url} after {failures} attempts ({reason}): check the network and run the "
            f"same command again, which resumes the download. Without a network, {without_network}"
        ) from error
    return reason


def _attempt(
    url: str, path: Path, check: Check, token: bool | None, note: Callable[[int, int], None]
) -> None:
    """Download what the part lacks, check the file, and rename it."""
    from huggingface_hub import get_hf_file_metadata

    metadata = get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS, token=token)
    size, etag = metadata.size, metadata.etag
    if size is None or not etag:
        raise DataError(f"{url} has no size or ETag: is --endpoint a Hugging Face hub?")
    version = hashlib.sha256(etag.encode()).hexdigest()[:16]
    part = path.with_name(f".{path.name}.{version}.part")
    with explained_writes(part):
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in set(path.parent.glob(f".{path.name}.*.part")) - {part}:
            other.unlink(missing_ok=True)  # of another version
        with part.open("ab") as file:
            note(file.tell(), size)
            if file.tell() < size:
                _receive(url, file, token, lambda arrived: note(arrived, size))
            fsync(file.fileno())
    if part.stat().st_size < size:
        raise _Damaged(f"{part.stat().st_size} of {size} bytes arrived")
    try:
        # A large file's ETag is its SHA-256; another file's says nothing about the content.
        if re.fullmatch(r"[0-9a-f]{64}", etag) and (found := sha256_file(part)) != etag:
            raise _Damaged(f"its SHA-256 is {found}, the hub says {etag}")
        if part.stat().st_size > size:
            raise _Damaged(f"{part.stat().st_size} bytes arrived, {size} were announced")
        check(part)
    except (_Damaged, DataError, OSError, ValueError) as error:
        part.unlink()
        raise _Damaged(f"what arrived is unusable: {error}") from error
    with explained_writes(path):
        part.replace(path)
        fsync_path(path.parent)


def _receive(url: str, file: BinaryIO, token: bool | None, note: Callable[[int], None]) -> None:
    """Append the bytes that `file` lacks."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined,unused-ignore]

    arrived = file.tell()
    headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={arrived}-"} if arrived else {}
    with get_session().stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_SECONDS
    ) as response:
        response.raise_for_status()
        if not response.headers.get("Content-Range", "").startswith(f"bytes {arrived}-"):
            file.seek(0)  # the server sends the whole file
            file.truncate()
        for chunk in response.iter_bytes():
            file.write(chunk)
            note(file.tell())


def _parts_of(error: Exception) -> tuple[int, str]:
    """Return an error's HTTP status, 0 without one, and its type and message on one line."""
    status = int(getattr(getattr(error, "response", None), "status_code", 0))
    return status, " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def explained_hub(repo: str) -> Iterator[None]:
    """Turn an error of the hub's library into one with a remedy."""
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is no repository's name, OWNER/NAME: {error}") from error
    except Exception as error:  # httpx's or httpx2's, by the library's version
        status, reason = _parts_of(error)
        if 400 <= status < 500 or isinstance(error, LocalTokenNotFoundError):
            raise UsageError(
                f"the hub refused {repo!r} ({status or 'no token'}): check the name, and log in by "
                "`hf auth login` with a token that may use it"
            ) from error
        raise DataError(
            f"{repo!r} could not be transferred ({reason}): run the same command again; files "
            "that arrived whole are not transferred twice"
        ) from error
