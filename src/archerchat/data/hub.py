"""Download data sets' files from the Hugging Face hub, in parallel.

`download_shards` fetches shards of text, `download_table` one Parquet file of another kind at a
pinned revision. The validation shard is the source's last, is fetched first and does not depend on
how many shards were asked for, so that runs on more or less data are validated alike.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_url

from archerchat.data.download import Download, Notify, Report, RetryPolicy, download_file
from archerchat.data.shards import Shard
from archerchat.errors import DataError, UsageError
from archerchat.files import explained_writes


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
        Download(
            directory / name,
            hf_hub_url(source.repository, name, repo_type="dataset", endpoint=endpoint),
            _check_shard,
            "`archerchat data build stdlib` makes a corpus",
            report,
            notify,
            stop=stop,
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
    download_file(
        hf_hub_url(repository, name, repo_type="dataset", revision=revision, endpoint=endpoint),
        path,
        _check_table,
        without_network="--data-dir names a folder with local files instead",
        token=None,
        report=report,
        notify=notify,
        retry=retry,
    )


def _check_shard(path: Path) -> None:
    try:
        Shard(path).close()
    except DataError as error:
        raise DataError(f"it is no text shard: {error}") from error


def _check_table(path: Path) -> None:
    try:
        pq.ParquetFile(path).close()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"it is no Parquet file: {error}") from error
