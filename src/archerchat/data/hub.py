"""Download files: the shards of data sets on the Hugging Face hub, and single files of any server.

A file arrives in `.<name>.<version>.part`, which a later attempt or a later process continues;
`hf_hub_download` would begin again. The file gets its name only when its size and, where the hub
states one, its SHA-256 are right and it opens as what it should be. A file that has its name is
therefore never checked again, and a repeated command with everything there needs no network.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import (
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined,unused-ignore]

from archerchat.data.shards import Shard
from archerchat.errors import DataError, UsageError
from archerchat.files import explained_writes, fsync, fsync_dir, sha256_file
from archerchat.home import Home
from archerchat.tasks.hub import TaskFiles

TIMEOUT_SECONDS = 10.0
ATTEMPTS = 6
"""Failures in a row until a download is given up; one that brought new bytes starts at one."""
FIRST_DELAY_SECONDS = 1.0
"""Doubled after each failure, up to `MAX_DELAY_SECONDS`."""
MAX_DELAY_SECONDS = 30.0
RETRIED_STATUS = {408, 425, 429}
PART = ".part"

Report = Callable[[str, int, int], None]
"""Receives a file's name, how many bytes of it have arrived, and its size; from several threads."""
Notify = Callable[[str], None]
"""Receives what went wrong and will be tried again, in words; from several threads."""


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub whose shards are numbered from 0; the last is validation."""

    repository: str
    num_shards: int

    def shard_names(self, num_train: int) -> list[str]:
        """Return the validation shard's name, then those of the first `num_train` others."""
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


def download_shards(
    source: HubSource,
    num_train: int,
    directory: Path,
    *,
    workers: int = 4,
    endpoint: str | None = None,
    report: Report = lambda name, arrived, size: None,
    notify: Notify = lambda message: None,
) -> list[Path]:
    """Fetch what `directory` lacks of the first `num_train` shards and validation, in parallel.

    The validation shard is fetched first and is the same for any `num_train`, so that runs on more
    or less data are validated alike.

    Args:
        endpoint: the hub's address; None leaves it to huggingface_hub (`HF_ENDPOINT`).

    Returns:
        What was fetched.

    Raises:
        UsageError: the source does not have that many shards.
        DataError: a file cannot be had; what arrived is kept for the next attempt.
    """
    names, stop = source.shard_names(num_train), threading.Event()
    missing = [name for name in names if not (directory / name).exists()]

    def fetch(name: str) -> None:
        download_file(
            hf_hub_url(source.repository, name, repo_type="dataset", endpoint=endpoint),
            directory / name,
            lambda path: Shard(path).close(),
            without_network="`archerchat data build stdlib` makes a corpus",
            token=None,
            report=report,
            notify=notify,
            stop=stop,
        )

    pool = ThreadPoolExecutor(workers, thread_name_prefix="download")
    try:
        if missing[:1] == names[:1]:
            # Alone and first: until it is there, the directory's last shard is a train shard.
            pool.submit(fetch, names[0]).result()
        for future in as_completed([pool.submit(fetch, name) for name in missing]):
            future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    return [directory / name for name in missing]


def task_files(
    home: Home,
    data_dir: Path | None = None,
    *,
    endpoint: str | None = None,
    notify: Notify = lambda message: None,
) -> TaskFiles:
    """Return where tasks find their rows.

    Downloads are kept in `home.cache_dir`. With several ranks, let one fetch before others read.

    Args:
        data_dir: a folder whose files stand in for the hub's; nothing is downloaded then.
        endpoint: the hub's address; None leaves it to huggingface_hub (`HF_ENDPOINT`).
    """

    def fetch(repository: str, revision: str, name: str, path: Path) -> None:
        if not path.exists():
            notify(f"fetching {name} of {repository}")
        download_file(
            hf_hub_url(repository, name, repo_type="dataset", revision=revision, endpoint=endpoint),
            path,
            lambda path: pq.ParquetFile(path).close(),
            without_network="--data-dir names a folder with local files instead",
            token=None,
            notify=notify,
        )

    return TaskFiles(cache=home.cache_dir / "tasks", local=data_dir, fetch=fetch)


def download_file(
    url: str,
    path: Path,
    check: Callable[[Path], None],
    *,
    without_network: str,
    token: bool | None = False,
    report: Report = lambda name, arrived, size: None,
    notify: Notify = lambda message: None,
    stop: threading.Event | None = None,
) -> None:
    """Fetch one file to `path`, unless it is there.

    Args:
        check: raises `DataError`, or pyarrow's error, when a complete file is not what it should
            be.
        without_network: ends the message about a server out of reach.
        token: False keeps the user's token from the server; None leaves it to huggingface_hub.
        stop: ends the download when it is set.

    Raises:
        DataError: the file cannot be had; what arrived is kept for the next attempt.
    """
    if path.exists():
        return
    with explained_writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    stop, failures = stop or threading.Event(), 0
    download = _Download(url, path, check, token, report, stop)
    while True:
        most_arrived = download.most_arrived
        try:
            return download.attempt()
        except (DataError, _Stopped):
            raise
        except Exception as error:  # httpx's or httpx2's, by huggingface_hub's version
            failures = 1 if download.most_arrived > most_arrived else failures + 1
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if 400 <= status < 500 and status not in RETRIED_STATUS:
                raise DataError(
                    f"{url} answered {status}: check the source's name and --endpoint, and that "
                    f"you may read it"
                ) from error
            if failures >= ATTEMPTS or isinstance(error, OfflineModeIsEnabled):
                raise DataError(
                    f"gave up on {url} after {failures} attempts ({reason}): check the network "
                    f"and run the same command again, which resumes the download. Without a "
                    f"network, {without_network}"
                ) from error
        delay = min(FIRST_DELAY_SECONDS * 2.0 ** (failures - 1), MAX_DELAY_SECONDS)
        notify(f"{path.name}: {reason}; trying again in {delay:.0f} s")
        if stop.wait(delay):
            raise _Stopped


class _Stopped(Exception):
    """Another file failed, or the user interrupted."""


class _Damaged(Exception):
    """What arrived is not the file."""


@dataclass
class _Download:
    """Fetch one file; the arguments are those of `download_file`."""

    url: str
    path: Path
    check: Callable[[Path], None]
    token: bool | None
    report: Report
    stop: threading.Event
    most_arrived: int = field(default=0, init=False)

    def attempt(self) -> None:
        """Append to the part what it lacks; check it and give it its name."""
        metadata = get_hf_file_metadata(self.url, timeout=TIMEOUT_SECONDS, token=self.token)
        if metadata.size is None or not metadata.etag:
            raise DataError(f"{self.url} has no size or ETag: is --endpoint a Hugging Face hub?")
        part = self._part(metadata.etag)
        with explained_writes(part), part.open("ab") as file:
            if file.tell() > metadata.size:
                file.seek(0)
                file.truncate()
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
        arrived = file.tell()
        self.report(self.path.name, arrived, size)
        if arrived == size:
            return
        headers = build_hf_headers(token=self.token) | {"Accept-Encoding": "identity"}
        if arrived:
            headers["Range"] = f"bytes={arrived}-"
        with get_session().stream(
            "GET", self.url, headers=headers, follow_redirects=True, timeout=TIMEOUT_SECONDS
        ) as response:
            response.raise_for_status()
            content_range = response.headers.get("Content-Range", "")
            if not content_range.startswith(f"bytes {arrived}-"):
                file.seek(0)  # the server sends the whole file
                file.truncate()
            for chunk in response.iter_bytes():
                if self.stop.is_set():
                    raise _Stopped
                file.write(chunk)
                self.most_arrived = max(self.most_arrived, file.tell())
                self.report(self.path.name, file.tell(), size)

    def _verify(self, part: Path, size: int, etag: str) -> None:
        """Check a complete part, and remove it if it is wrong."""
        arrived = part.stat().st_size
        if arrived < size:
            raise _Damaged(f"{arrived} of {size} bytes arrived")  # the next attempt continues
        try:
            if arrived > size:
                raise _Damaged(f"{arrived} bytes arrived, {size} were announced")
            # A large file's ETag is its SHA-256; another file's says nothing about the content.
            if re.fullmatch(r"[0-9a-f]{64}", etag) and (found := sha256_file(part)) != etag:
                raise _Damaged(f"its SHA-256 is {found}, the hub says {etag}")
            self.check(part)
        except (_Damaged, DataError, pa.ArrowException) as error:
            part.unlink()
            raise _Damaged(f"what arrived is unusable: {error}") from error


@contextmanager
def explained_hub(repo: str) -> Iterator[None]:
    """Turn what the hub's library says into an error with a remedy."""
    try:
        yield
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is no repository's name, OWNER/NAME: {error}") from error
    except Exception as error:  # httpx's or httpx2's, by the library's version
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if 400 <= status < 500 or isinstance(error, LocalTokenNotFoundError):
            raise UsageError(
                f"the hub refused {repo!r} ({status or 'no token'}): check the name, and log in by "
                "`hf auth login` with a token that may use it"
            ) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"{repo!r} could not be transferred ({reason}): run the same command again; files "
            "that arrived whole are not transferred twice"
        ) from error
