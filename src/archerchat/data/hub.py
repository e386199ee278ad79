"""Download shards of text data sets from the Hugging Face hub."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from archerchat.data.shards import Shard
from archerchat.downloads import Notify, Report, download_file
from archerchat.errors import UsageError


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
                "least 1 is needed"
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
    """Fetch validation and the first `num_train` other shards, in parallel; return the new ones.

    Validation is the same shard for any `num_train`, so that all runs are validated alike.

    Args:
        endpoint: the hub's address; None leaves it to huggingface_hub (`HF_ENDPOINT`).

    Raises:
        UsageError: the source does not have that many shards.
        DataError: a download failed; the next attempt continues it.
    """
    from huggingface_hub import hf_hub_url  # imported here: pretraining needs no hub

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
