"""What a run says of where it ran: versions, the commit of the checkout, the command line.

Everything is read from memory and files: a run starts no process for it.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from pathlib import Path

import torch

from archerchat import __version__

COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


def describe_environment() -> dict[str, str | int | None]:
    """Return facts by name; the device itself is in `runtime.describe_hardware`."""
    return {
        "archerchat": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "git_commit": find_commit(Path(__file__)),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def find_commit(path: Path) -> str | None:
    """Return the commit that is checked out where `path` lies; None outside a checkout."""
    for parent in path.resolve().parents:
        entry = parent / ".git"
        try:
            if entry.is_file():  # of a worktree: `gitdir: PLACE`
                place = entry.read_text().removeprefix("gitdir:").strip()
                return _head((parent / place).resolve())
            if entry.is_dir():
                return _head(entry)
        except (OSError, UnicodeDecodeError):
            return None
    return None


def _head(directory: Path) -> str | None:
    head = (directory / "HEAD").read_text().strip()
    if not head.startswith("ref:"):
        return head if COMMIT.fullmatch(head) else None
    name = head.removeprefix("ref:").strip()
    shared = directory / "commondir"
    common = (directory / shared.read_text().strip()) if shared.is_file() else directory
    for place in (directory, common):
        if (place / name).is_file():
            commit = (place / name).read_text().strip()
            return commit if COMMIT.fullmatch(commit) else None
    packed = common / "packed-refs"
    for line in packed.read_text().splitlines() if packed.is_file() else ():
        commit, _, packed_name = line.partition(" ")
        if packed_name == name and COMMIT.fullmatch(commit):
            return commit
    return None
