"""Give the tasks their files: from a local folder, or downloaded once from the hub.

files = task_files(home, data_dir=None, notify=print)
build_task("GSM8K", "test", files)
"""

from __future__ import annotations

from pathlib import Path

from archerchat.data.download import Notify, RetryPolicy
from archerchat.data.hub import download_table
from archerchat.home import Home
from archerchat.tasks.hub import TaskFiles


def task_files(
    home: Home,
    data_dir: Path | None = None,
    *,
    endpoint: str | None = None,
    notify: Notify = lambda message: None,
    retry: RetryPolicy | None = None,
) -> TaskFiles:
    """Return where tasks find their rows.

    Downloads go under `home.cache_dir`. Of several ranks one should fetch before the others read.

    Args:
        data_dir: a folder whose files stand in for the hub's; nothing is downloaded then.
        endpoint: the hub's address; None leaves it to huggingface_hub (`HF_ENDPOINT`).
    """

    def fetch(repository: str, revision: str, name: str, path: Path) -> None:
        if not path.exists():
            notify(f"fetching {name} of {repository}")
        download_table(
            repository, revision, name, path, endpoint=endpoint, notify=notify, retry=retry
        )

    return TaskFiles(cache=home.cache_dir / "tasks", local=data_dir, fetch=fetch)
