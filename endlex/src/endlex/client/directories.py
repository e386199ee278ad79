"""A run's directory: where it is, and whose it is; and the list of all of this machine's.

    run.json                 the run's id, project and name, written once
    journal/*.jsonl          one file per session
    staged/NAME/             files of checkpoints that the server does not have yet
    manifests/NAME.json      what each checkpoint's files were, as hashed here
    shipper.lock .json .log  the process that sends all this: its lock, state and log

The same directory is the same run. Another machine joins a run by its id. `endlex verify` must know
every run on the machine: `endlex.init` adds each directory to the list `endlex/directories` under
`XDG_STATE_HOME` (or `~/.local/state`), one path per line, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any, Literal, TypedDict, cast, get_args

from endlex.client.process import process_name, warn, write_whole
from endlex.protocol import PROTOCOL, RUN_FILE, EndlexError, check_name, check_run_id

Mode = Literal["online", "offline", "disabled"]
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


class RunFile(TypedDict):
    """Content of `run.json`; `created` is in Unix seconds."""

    run: str
    project: str
    name: str
    created: float


def session_start(owner: RunFile, kind: str, **given: Any) -> dict[str, Any]:
    """Return the first record of a session that this process writes, with the given values."""
    return {
        "protocol": PROTOCOL,
        **{key: owner[key] for key in ("run", "project", "name")},
        **{"config": {}, "tags": [], "group": None, "notes": None},
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "process": process_name(),
        **{"rank": 0, "kind": kind},
        **given,
    }


def read_run_file(directory: Path | str) -> RunFile | None:
    """Return whose run a directory holds; None if it holds none."""
    path = Path(directory) / RUN_FILE
    try:
        content = json.loads(path.read_bytes())
        check_run_id(content["run"])
        check_name(content["project"], "project")
        check_name(content["name"], "run name")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, EndlexError) as error:
        remedy = "restore it, or give another directory"
        raise EndlexError(f"{path} does not say whose run this is ({error}): {remedy}") from error
    return cast(RunFile, content)


def require_run_file(directory: Path) -> RunFile:
    owner = read_run_file(directory)
    if owner is None:
        raise EndlexError(f"{directory} has no {RUN_FILE}: it is not the directory of a run")
    return owner


def claim_directory(
    directory: Path, run: str, project: str, name: str, created: float | None = None
) -> RunFile:
    """Write `run.json`, once and whole; of several processes the first one's stays."""
    directory.mkdir(parents=True, exist_ok=True)
    created = time.time() if created is None else created
    content: RunFile = {"run": run, "project": project, "name": name, "created": created}
    temporary = directory / f".{RUN_FILE}.{os.urandom(4).hex()}.tmp"
    try:
        write_whole(temporary, json.dumps(content).encode())
        try:
            os.link(temporary, directory / RUN_FILE)
        except OSError:  # it is there, or no hard links are: then two at one moment are rare
            if not (directory / RUN_FILE).exists():
                temporary.replace(directory / RUN_FILE)
    finally:
        temporary.unlink(missing_ok=True)
    return read_run_file(directory) or content


def find_or_claim(
    project: str,
    name: str | None,
    run_id: str | None,
    directory: Path | str | None,
    folder: Path | str | None,
    resume: bool | str | None,
) -> tuple[Path, RunFile]:
    """Find or make a run's directory, in `folder` if none is given; return it with its run."""
    if resume not in (None, True, False, "allow", "must", "never", "auto"):
        raise EndlexError(f"resume {resume!r} must be allow, must, never or auto")
    new_id = run_id or "".join(ALPHABET[byte % len(ALPHABET)] for byte in os.urandom(10))
    folder = Path(folder or runs_folder()) / _as_file_name(project)
    if directory is None and run_id is None and resume in (True, "auto"):
        directory = _newest_directory(folder, project, name)
    if directory is None:
        # A run that is there under its id keeps its directory, whatever it is called now.
        known = [run.parent for run in sorted(folder.glob(f"*-{new_id}/{RUN_FILE}"))]
        directory = known[0] if known else folder / f"{_as_file_name(name or 'run')}-{new_id}"
    place = Path(directory).absolute()
    owner = read_run_file(place)
    if owner is None and resume == "must":
        remedy = "give the run's directory; a run of another machine is joined by its id alone"
        raise EndlexError(f"{place} holds no run to resume (resume='must'): {remedy}")
    if owner is not None and resume == "never":
        raise EndlexError(f"{place} holds a run already (resume='never'): give another directory")
    if owner is None:
        owner = claim_directory(place, new_id, project, name or f"run-{new_id}")
    theirs, asked = (owner["name"], owner["project"]), (name or owner["name"], project)
    if theirs != asked:
        whose = "run {!r} of project {!r}, not of {!r} of {!r}".format(*theirs, *asked)
        raise EndlexError(f"{place} is the directory of {whose}: give another directory")
    if run_id not in (None, owner["run"]):
        remedy = "give another directory, or leave the id (ENDLEX_RUN_ID) away"
        whose = f"the run with id {owner['run']!r}, not {run_id!r}"
        raise EndlexError(f"{place} is the directory of {whose}: {remedy}")
    register(place)
    return place, owner


def _newest_directory(folder: Path, project: str, name: str | None) -> Path | None:
    found = []
    for path in folder.glob(f"*/{RUN_FILE}"):
        with contextlib.suppress(EndlexError):
            owner = require_run_file(path.parent)
            if owner["project"] == project and name in (None, owner["name"]):
                found.append((owner["created"], path.parent))
    return max(found)[1] if found else None


def _as_file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:80] or "run"


def runs_folder() -> Path:
    return Path(os.environ.get("ENDLEX_DIR") or "endlex-runs")


def given_run_id(run: str | None = None) -> str | None:
    """Return the run id given in the call, or else by `ENDLEX_RUN_ID`; None if there is none."""
    run = run or os.environ.get("ENDLEX_RUN_ID")
    return check_run_id(run) if run else None


def server_url() -> str | None:
    return os.environ.get("ENDLEX_URL", "").strip() or None


def server_token() -> str | None:
    """Return the token of `ENDLEX_TOKEN` or of the file `~/.config/endlex/token`, if any."""
    token = os.environ.get("ENDLEX_TOKEN", "").strip()
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        token = token or (Path.home() / ".config" / "endlex" / "token").read_text().strip()
    return token or None


def is_on(name: str) -> bool:
    """Whether `ENDLEX_<name>` does not say no."""
    return os.environ.get(f"ENDLEX_{name}", "").strip().lower() not in ("0", "false", "off", "no")


def chosen_mode(given: str | None) -> Mode:
    mode = given or os.environ.get("ENDLEX_MODE") or ("online" if server_url() else "offline")
    if mode not in get_args(Mode):
        raise EndlexError(f"mode {mode!r} must be one of {', '.join(get_args(Mode))}")
    if mode == "online" and not server_url():
        raise EndlexError("mode 'online' needs a server: set ENDLEX_URL, or use mode 'offline'")
    return cast(Mode, mode)


def environment_number(name: str) -> int:
    """Return a number that a launcher sets, such as a rank; what it leaves empty is 0."""
    text = os.environ.get(name, "").strip()
    return int(text) if text.isdecimal() else 0


def registry() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "endlex" / "directories"


def register(directory: Path) -> None:
    """Add a run's directory to the list, or say on stderr why that is not possible."""
    try:
        path, line = registry(), json.dumps(str(directory.absolute())).encode()
        if path.exists() and line in path.read_bytes().splitlines():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
        with path.open("ab", buffering=0) as file:
            file.write(b"\n" + line + b"\n")  # apart from a line that was torn
    except (OSError, RuntimeError) as error:
        fault = f"cannot note {directory} in the list of this machine's runs ({error})"
        warn(f"{fault}: `endlex verify` finds it there only if you name it")


def registered() -> list[Path]:
    """Return the directories of the list, oldest first."""
    found = dict[Path, None]()
    with contextlib.suppress(FileNotFoundError, RuntimeError):
        for line in registry().read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError):  # empty, or torn by a full disk
                found[Path(json.loads(line))] = None
    return list(found)
