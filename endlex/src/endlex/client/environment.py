"""What a run was: commit, uncommitted changes, command, versions, machine.

Nothing here stops a run: what cannot be found out is left out. Only the changes need a process,
`git diff`, for a few milliseconds. ENDLEX_ENVIRONMENT=0 leaves all of it away.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from endlex.protocol import MAX_TEXT_CHARS

GIT_SECONDS = 5.0
COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


def describe_environment(place: Path | str | None = None) -> dict[str, Any]:
    """Return what there is to know of this process: command, commit, versions, machine.

    Args:
        place: in the git checkout that counts; that of the program or of the working directory if
            not given.
    """
    root = _checkout(place)
    found = {
        "command": shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]]),
        "program": sys.argv[0],
        "directory": str(Path.cwd()),
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "host": platform.node(),
        "cpus": os.cpu_count(),
    }
    if root is not None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            commit, found["branch"] = _head(_git_directory(root))
            found["commit"] = commit if COMMIT.fullmatch(commit or "") else None
    return found


def _git_directory(root: Path) -> Path:
    entry = root / ".git"
    if entry.is_dir():
        return entry
    return (root / entry.read_text().removeprefix("gitdir:").strip()).resolve()  # of a worktree


def _head(directory: Path) -> tuple[str | None, str | None]:
    """Return commit and branch from git's own files: no process is started for it."""
    head = (directory / "HEAD").read_text().strip()
    if not head.startswith("ref:"):
        return head, None
    name = head.removeprefix("ref:").strip()
    shared = directory / "commondir"
    common = (directory / shared.read_text().strip()) if shared.is_file() else directory
    for place in (directory / name, common / name):
        if place.is_file():
            return place.read_text().strip(), name.removeprefix("refs/heads/")
    packed = common / "packed-refs"
    for line in packed.read_text().splitlines() if packed.is_file() else ():
        commit, _, packed_name = line.partition(" ")
        if packed_name == name:
            return commit, name.removeprefix("refs/heads/")
    return None, name.removeprefix("refs/heads/")


def uncommitted_changes(place: Path | str | None = None) -> str:
    """Return the checkout's `git diff HEAD`; empty outside one, cut where it is very long."""
    import subprocess  # takes longer to import than the rest of the client

    root = _checkout(place)
    if root is None:
        return ""
    command = ["git", "-C", str(root), "diff", "HEAD", "--no-color", "--no-ext-diff"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=GIT_SECONDS,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace")[:MAX_TEXT_CHARS]


def installed_packages() -> str:
    """Return `name==version` of each package that can be imported here, one per line, sorted."""
    return "\n".join(sorted(set(_packages()), key=str.lower))


def _packages() -> Iterator[str]:
    for entry in sys.path:  # by the directories' names: reading every package takes long
        try:
            names = [path.name for path in Path(entry or ".").iterdir()]
        except OSError:
            continue
        for name in names:
            if name.endswith((".dist-info", ".egg-info")) and "-" in name:
                package, _, version = name.rpartition(".")[0].partition("-")
                yield f"{package.replace('_', '-')}=={version}"


def _checkout(place: Path | str | None) -> Path | None:
    program = Path(sys.argv[0]) if sys.argv and sys.argv[0] not in ("", "-c") else None
    for start in [place] if place is not None else [program and program.parent, Path.cwd()]:
        here = Path(start).resolve() if start is not None else None
        for parent in [here, *here.parents] if here else []:
            if (parent / ".git").exists():
                return parent
    return None
