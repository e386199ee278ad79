"""Where this machine's run directories are: `endlex.init` notes each of them in one list.

`endlex verify` must know of every run that goes with the machine, wherever it was recorded. The
list is `endlex/directories` under the user's state directory (`XDG_STATE_HOME`, or
`~/.local/state`): one path per line, as JSON. A directory that is gone stays in the list.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from endlex.client.warning import warn


def registry() -> Path:
    """Return where the list is.

    Raises:
        RuntimeError: the user has no home directory.
    """
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "endlex" / "directories"


def register(directory: Path) -> None:
    """Add a run's directory to the list, or say on stderr why that is not possible."""
    try:
        path, line = registry(), json.dumps(str(directory.absolute())).encode()
        if path.exists() and line in path.read_bytes().splitlines():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, b"\n" + line + b"\n")  # apart from a line that was torn
        finally:
            os.close(descriptor)
    except (OSError, RuntimeError) as error:
        warn(
            f"cannot note {directory} in the list of this machine's runs ({error}): "
            "`endlex verify` finds it there only if you name it"
        )


def registered() -> list[Path]:
    """Return the directories of the list, oldest first.

    Raises:
        OSError: the list cannot be read.
    """
    try:
        lines = registry().read_bytes().splitlines()
    except (FileNotFoundError, RuntimeError):
        return []
    found = []
    for line in lines:
        try:
            found.append(Path(json.loads(line)))
        except (ValueError, TypeError):  # empty, or torn by a full disk
            continue
    return list(dict.fromkeys(found))
