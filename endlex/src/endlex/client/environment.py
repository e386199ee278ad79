"""What a run was: commit, uncommitted changes, command, versions, machine.

Nothing here stops a run: what cannot be found out is left out. git is asked twice, a few
milliseconds each; ENDLEX_ENVIRONMENT=0 leaves all of it away.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from endlex.protocol import MAX_TEXT_CHARS

GIT_SECONDS = 5.0


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
        status = _git(root, "status", "--porcelain", "--branch", "--untracked-files=no")
        head, *changed = (status or "").splitlines() or [""]
        found |= {
            "commit": (_git(root, "rev-parse", "HEAD") or "").strip() or None,
            "branch": head.removeprefix("## ").partition("...")[0] or None,
            "uncommitted_files": len(changed),
        }
    return found


def uncommitted_changes(place: Path | str | None = None) -> str:
    """Return the checkout's `git diff HEAD`; empty outside one, cut where it is very long."""
    root = _checkout(place)
    return (
        (_git(root, "diff", "HEAD", "--no-color", "--no-ext-diff") or "")[:MAX_TEXT_CHARS]
        if root
        else ""
    )


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


def _git(root: Path, *words: str) -> str | None:
    import subprocess  # takes longer to import than the rest of the client

    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=GIT_SECONDS,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
