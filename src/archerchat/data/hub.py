"""Download files from the Hugging Face hub: parallel, resumable, retried, checked.

`download_shards` fetches shards of text, `download_table` one Parquet file of another kind at a
pinned revision, `download_file` any file from any server. A file arrives in
`.<name>.<version>.part`, which a later attempt, or a later process, goes on with. Only when its
size and, where the hub states one, its SHA-256 are right and it opens as what it should be does it
get its name; a file that has its name is therefore never looked at again, and a repeated command
with everything there needs no network.

The validation shard is the source's last, is fetched first and does not depend on how many
shards were asked for, so that runs on more or less data are validated alike.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined,unused-ignore]

from archerchat.artifacts import fsync_dir, sha256_file
from archerchat.data.shards import Shard, explained_writes
from archerchat.errors import DataError, UsageError

TIMEOUT_SECONDS = 10.0
MAX_DELAY_SECONDS = 30.0
RETRIED_STATUS = {408, 425, 429}
PART = ".part"


@dataclass(frozen=True)
class HubSource:
    """Name a data set on the hub whose shards are numbered from 0; the last is validation."""

    repository: str
    num_shards: int

    def shard_names(self, num_train: int) -> list[str]:
        """Return the validation shard's name, then those of the first `num_train` others.

        Raises:
            UsageError: the source does not have that many.
        """
        last = self.num_shards - 1
        if not 1 <= num_train <= last:
            raise UsageError(
                f"{num_train} train shards were asked for: {self.repository} has {last}, and at "
                f"least 1 is needed"
            )
        return [f"shard_{index:05d}.parquet" for index in (last, *range(num_train))]


SOURCES = {
    "climbmix": HubSource("karpathy/climbmix-400b-shuffle", 6543),
    "fineweb-edu": HubSource("karpathy/fineweb-edu-100b-shuffle", 1822),
}


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


def download_shards(
    source: HubSource,
    num_train: int,
    directory: Path,
    *,
    workers: int = 4,
    endpoint: str | None = None,
    report: Report = lambda name, arrived, size: None,
    notify: Notify = lambda message: None,
    retry: RetryPolicy | None = None,
) -> list[Path]:
    """Fetch the shards that `directory` lacks of the first `num_train` and validation.

    Returns what it fetched.

    Args:
        endpoint: the hub's address; None leaves it to huggingface_hub (`HF_ENDPOINT`).

    Raises:
        UsageError: the source does not have so many shards, or there is no worker.
        DataError: a file cannot be had; what arrived is kept for the next attempt.
    """
    if workers < 1:
        raise UsageError(f"{workers} workers cannot download: give at least 1")
    names = source.shard_names(num_train)
    missing = [name for name in names if not (directory / name).exists()]
    if not missing:
        return []
    with explained_writes(directory):
        directory.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    downloads = [
        _Download(
            directory / name,
            hf_hub_url(source.repository, name, repo_type="dataset", endpoint=endpoint),
            report,
            notify,
            stop,
        )
        for name in missing
    ]
    retry = retry or RetryPolicy()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="download")
    try:
        if missing[0] == names[0]:
            # Alone and first: until it is there, the directory's last shard is a train shard.
            pool.submit(downloads.pop(0).run, retry).result()
        for future in as_completed([pool.submit(each.run, retry) for each in downloads]):
            future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    return [directory / name for name in missing]


def download_table(
    repository: str,
    revision: str,
    name: str,
    path: Path,
    *,
    endpoint: str | None = None,
    report: Report = lambda name, arrived, size: None,
    notify: Notify = lambda message: None,
    retry: RetryPolicy | None = None,
) -> None:
    """Fetch one Parquet file of a data set to `path`, unless it is there.

    Args:
        revision: the commit; what it names never changes.
        name: the file's path in the repository.

    Raises:
        DataError: it cannot be had; what arrived is kept for the next attempt.
    """
    if path.exists():
        return
    with explained_writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _Download(
        path,
        hf_hub_url(repository, name, repo_type="dataset", revision=revision, endpoint=endpoint),
        report,
        notify,
        threading.Event(),
        check=_check_table,
        without_network="--data-dir names a folder with local files instead",
    ).run(retry or RetryPolicy())


def download_file(
    url: str,
    path: Path,
    check: Callable[[Path], None],
    *,
    without_network: str,
    report: Report = lambda name, arrived, size: None,
    notify: Notify = lambda message: None,
    retry: RetryPolicy | None = None,
) -> None:
    """Fetch one file from any server to `path`, unless it is there; the hub's token stays here.

    Args:
        check: raises `DataError` when a complete file is not what it should be.
        without_network: ends the message about a server out of reach.

    Raises:
        DataError: it cannot be had; what arrived is kept for the next attempt.
    """
    if path.exists():
        return

    def explained_check(path: Path) -> None:
        try:
            check(path)
        except DataError as error:
            raise _Damaged(str(error)) from error

    with explained_writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _Download(
        path,
        url,
        report,
        notify,
        threading.Event(),
        check=explained_check,
        without_network=without_network,
        token=False,
    ).run(retry or RetryPolicy())


def _check_shard(path: Path) -> None:
    try:
        Shard(path).close()
    except DataError as error:
        raise _Damaged(f"it is no text shard: {error}") from error


def _check_table(path: Path) -> None:
    try:
        pq.ParquetFile(path).close()
    except (OSError, pa.ArrowException) as error:
        raise _Damaged(f"it is no Parquet file: {error}") from error


class _Stopped(Exception):
    """Another file failed, or the user interrupted."""


class _Damaged(Exception):
    """What arrived is not the file."""


class _Download:
    """Fetch one file."""

    def __init__(
        self,
        path: Path,
        url: str,
        report: Report,
        notify: Notify,
        stop: threading.Event,
        check: Callable[[Path], None] = _check_shard,
        without_network: str = "`archerchat data build stdlib` makes a corpus",
        token: bool | None = None,
    ) -> None:
        """Prepare to fetch `url`.

        Args:
            check: raises `_Damaged` when a complete file is not what it should be.
            without_network: ends the message about a hub out of reach.
            token: False keeps the user's token from the server; None leaves it to huggingface_hub.
        """
        self._path = path
        self._url = url
        self._report = report
        self._notify = notify
        self._stop = stop
        self._check = check
        self._without_network = without_network
        self._token = token
        self._most_arrived = 0

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
            self._notify(f"{self._path.name}: {reason}; trying again in {delay:.0f} s")
            if self._stop.wait(delay):
                raise _Stopped

    def _check_hope(self, error: Exception, reason: str, failures: int, retry: RetryPolicy) -> None:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if 400 <= status < 500 and status not in RETRIED_STATUS:
            raise DataError(
                f"{self._url} answered {status}: check the source's name and --endpoint, and that "
                f"you may read it"
            ) from error
        if failures >= retry.attempts or isinstance(error, OfflineModeIsEnabled):
            raise DataError(
                f"gave up on {self._url} after {failures} attempts ({reason}): check the network "
                f"and run the same command again, it goes on where it stopped. Without a network, "
                f"{self._without_network}"
            ) from error

    def _attempt(self) -> None:
        metadata = get_hf_file_metadata(self._url, timeout=TIMEOUT_SECONDS, token=self._token)
        if metadata.size is None or not metadata.etag:
            raise DataError(f"{self._url} has no size or ETag: is --endpoint a Hugging Face hub?")
        part = self._part(metadata.etag)
        with explained_writes(part), part.open("ab") as file:
            if file.tell() > metadata.size:
                _empty(file)
            self._receive(file, metadata.size)
            os.fsync(file.fileno())
        self._verify(part, metadata.size, metadata.etag)
        with explained_writes(self._path):
            part.replace(self._path)
            fsync_dir(self._path.parent)

    def _part(self, etag: str) -> Path:
        """Return where this version of the file arrives; parts of other versions are removed."""
        prefix = f".{self._path.name}."
        version = hashlib.sha256(etag.encode()).hexdigest()[:16]
        part = self._path.with_name(f"{prefix}{version}{PART}")
        for other in part.parent.glob(f"{prefix}*{PART}"):
            if other != part:
                other.unlink(missing_ok=True)
        return part

    def _receive(self, file: BinaryIO, size: int) -> None:
        """Append what `file` lacks."""
        self._report(self._path.name, file.tell(), size)
        if file.tell() == size:
            return
        headers = build_hf_headers(token=self._token) | {"Accept-Encoding": "identity"}
        if file.tell():
            headers["Range"] = f"bytes={file.tell()}-"
        with get_session().stream(
            "GET", self._url, headers=headers, follow_redirects=True, timeout=TIMEOUT_SECONDS
        ) as response:
            response.raise_for_status()
            content_range = response.headers.get("Content-Range", "")
            if not content_range.startswith(f"bytes {file.tell()}-"):
                _empty(file)  # the server sends the whole file
            for chunk in response.iter_bytes():
                if self._stop.is_set():
                    raise _Stopped
                file.write(chunk)
                self._most_arrived = max(self._most_arrived, file.tell())
                self._report(self._path.name, file.tell(), size)

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
            self._check(part)
        except _Damaged:
            part.unlink()
            raise


def _empty(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()
