"""What RUN means on a command line: a run's directory on this machine, or a run of the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from endlex.api import Api
from endlex.client.run_directory import RunFile, read_run_file, registered, runs_folder
from endlex.commands.rendering import count
from endlex.protocol import RUN_FILE, EndlexError, UsageError
from endlex.reading import session_files, summarize


def is_run_directory(path: Path) -> bool:
    """Whether a directory holds a run."""
    return path.is_dir() and ((path / RUN_FILE).is_file() or bool(session_files(path)))


def open_run_directory(path: Path) -> RunFile:
    """Return whose directory this is.

    Raises:
        UsageError: it is not a run's.
        EndlexError: its run.json is damaged.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory; a run's is like endlex-runs/PROJECT/NAME-ID")
    owner = read_run_file(path)
    if owner is None:
        inside = find_run_directories(path)
        hint = f"; give one of those in it, such as {inside[0]}" if inside else ""
        raise UsageError(f"{path} is not a run's directory: it has no {RUN_FILE}{hint}")
    return owner


def find_run_directories(folder: Path) -> list[Path]:
    """Return the run directories at or below a folder, at most two levels deep."""
    levels = ("", "*/", "*/*/")
    found = {path.parent for level in levels for path in folder.glob(f"{level}{RUN_FILE}")}
    return sorted(found)


@dataclass(frozen=True)
class LocalRuns:
    """The run directories that are known on this machine."""

    found: dict[Path, RunFile] = field(default_factory=dict)
    gone: list[Path] = field(default_factory=list)
    """Directories in which a run was recorded, and where there is none now."""
    unreadable: dict[Path, str] = field(default_factory=dict)
    """Directories that cannot be read, with the reason."""

    def __str__(self) -> str:
        said = [f"looked at {count(len(self.found), 'run')} on this machine"]
        if self.gone:
            places = ", ".join(map(str, self.gone[:5])) + (", ..." if self.gone[5:] else "")
            said.append(f"{len(self.gone):,} gone (deleted, or not mounted): {places}")
        said += [f"cannot read {place}: {reason}" for place, reason in self.unreadable.items()]
        return "\n".join(said)


def local_runs() -> LocalRuns:
    """Look at the run directories in `runs_folder()`, and wherever else `endlex.init` made some.

    Raises:
        OSError: the list of them cannot be read.
    """
    runs = LocalRuns()
    places = [*find_run_directories(runs_folder()), *registered()]
    for directory in {place.resolve(): place for place in reversed(places)}.values():
        try:
            owner = read_run_file(directory)
            if owner is not None:
                runs.found[directory] = owner
            elif session_files(directory):
                runs.unreadable[directory] = f"it has journals and no {RUN_FILE}"
            else:
                runs.gone.append(directory)
        except (OSError, EndlexError) as error:
            runs.unreadable[directory] = str(error)
    return LocalRuns(dict(sorted(runs.found.items())), sorted(runs.gone), runs.unreadable)


def find_local_run(text: str) -> Path | None:
    """Return the directory on this machine that a word means; None when there is none.

    Args:
        text: a path, or the id, name or project/name of one of `local_runs()`.

    Raises:
        EndlexError: several runs there have that name.
    """
    if is_run_directory(Path(text)):
        return Path(text)
    found = [
        directory
        for directory, owner in local_runs().found.items()
        if text in (owner["run"], owner["name"], f"{owner['project']}/{owner['name']}")
    ]
    if len(found) > 1:
        listed = ", ".join(map(str, found))
        raise EndlexError(f"{text!r} is the name of {len(found)} runs here: give one of {listed}")
    return found[0] if found else None


def find_server(url: str | None) -> Api:
    """Return the server named on the command line or in the environment.

    Raises:
        EndlexError: none was named, or the address or the token is not one.
    """
    return Api(url, read_only=False)


def load_run(text: str, url: str | None) -> dict[str, Any]:
    """Return what there is to know of a run: from its directory here, else from the server."""
    if is_run_directory(Path(text)):
        return summarize(Path(text))
    return find_server(url).run(text).whole
