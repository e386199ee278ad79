"""Give the tasks their files: from a local folder, or downloaded once from the hub.

files = task_files(home, data_dir=None, notify=print)
build_task("GSM8K", "test", files)
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
from huggingface_hub import hf_hub_url

from archerchat.data.hub import Notify, download_file
from archerchat.home import Home
from archerchat.tasks.hub import TaskFiles


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
