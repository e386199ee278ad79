"""Where everything lives on disk.

One base directory (`ARCHERCHAT_HOME`, default `~/.cache/archerchat`) holds what ArcherChat writes
or downloads, except torch's compiled code and Endlex's own files:

    data/<source>/shard_00000.parquet    text shards; the last one is for validation
    tokenizers/<name>/                   ranks and JSON
    checkpoints/<stage>/<tag>/step_*/    stage is base, sft or rl
    evals/<stage>/<tag>/                 results of evaluations, by step
    cache/                               measured peak rates, downloaded vocabularies
    runs/<tag>/                          journals
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from archerchat.errors import UsageError


@dataclass(frozen=True)
class Home:
    """Name every directory under one base directory; creates nothing."""

    root: Path

    @classmethod
    def from_environment(cls) -> Home:
        """Take `ARCHERCHAT_HOME`, or `~/.cache/archerchat` where it is unset or empty."""
        given = os.environ.get("ARCHERCHAT_HOME")
        return cls(Path(given).expanduser() if given else Path.home() / ".cache" / "archerchat")

    def data_dir(self, source: str) -> Path:
        return self.root / "data" / check_name(source, "data source")

    def tokenizer_dir(self, name: str) -> Path:
        return self.root / "tokenizers" / check_name(name, "tokenizer name")

    def stage_dir(self, stage: str, kind: str = "checkpoints") -> Path:
        return self.root / kind / check_name(stage, "stage")

    def checkpoint_dir(self, stage: str, tag: str) -> Path:
        return self.stage_dir(stage) / check_name(tag, "model tag")

    def eval_dir(self, stage: str, tag: str) -> Path:
        return self.stage_dir(stage, "evals") / check_name(tag, "model tag")

    def run_dir(self, tag: str) -> Path:
        return self.root / "runs" / check_name(tag, "run name")

    @property
    def cache_dir(self) -> Path:
        return self.root / "cache"


def check_name(name: str, what: str) -> str:
    """Return `name` if it can be one directory's name, else raise a UsageError."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise UsageError(
            f"{what} {name!r} cannot be a directory's name: use letters, digits, '-', '_' and, "
            "after the first, '.'"
        )
    return name
