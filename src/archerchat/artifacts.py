"""Where everything lives on disk, and how it gets there without ever being half-written.

One base directory (`ARCHERCHAT_HOME`, default `~/.cache/archerchat`) holds all that
ArcherChat makes or downloads:

    data/<source>/shard_00000.parquet    text shards, the last one is validation
    tokenizers/<name>/                   ranks and JSON
    checkpoints/<stage>/<tag>/step_*/    stage is base, sft or rl
    cache/                               measured peak rates, downloaded vocabularies
    runs/<tag>/                          journals

Files are written under a temporary name, fsynced and renamed, so that a reader sees the
old content or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def checkpoint_dir(self, stage: str, tag: str) -> Path:
        return self.root / "checkpoints" / stage / check_name(tag, "model tag")

    def run_dir(self, tag: str) -> Path:
        return self.root / "runs" / check_name(tag, "run name")

    @property
    def cache_dir(self) -> Path:
        return self.root / "cache"


def check_name(name: str, what: str) -> str:
    """Return `name` if it can be one directory's name.

    Raises:
        UsageError: it is empty, starts with a dot, or holds a path separator.
    """
    if not name or name.startswith(".") or any(c in name for c in "/\\\0"):
        raise UsageError(
            f"{what} {name!r} cannot be a directory's name: use letters, digits, '-', '_' and '.'"
        )
    return name


def fsync_dir(path: Path) -> None:
    """Make renames inside `path` durable; a no-op where directories cannot be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file `path` by `content`, atomically and durably.

    Raises:
        OSError: as the system says (disk full, no permission); `path` is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinities are refused."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory that becomes `path` when the block succeeds.

    Every file in it is fsynced before the rename; when the block raises, the temporary
    directory is removed and `path` is untouched. An existing `path` is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
        fsync_dir(temporary)
        if path.exists():
            stale = path.with_name(f".{path.name}.stale.tmp")
            shutil.rmtree(stale, ignore_errors=True)
            path.replace(stale)
            temporary.replace(path)
            shutil.rmtree(stale, ignore_errors=True)
        else:
            temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_dir(path.parent)


def remove_leftovers(directory: Path) -> None:
    """Delete temporary entries that a killed process left in `directory`."""
    if directory.is_dir():
        for entry in directory.glob(".*.tmp"):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
