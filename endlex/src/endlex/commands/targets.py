"""What RUN means on a command line: which run directories of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from endlex.client.directories import RunFile, read_run_file, registered, runs_folder
from endlex.commands.rendering import count
from endlex.protocol import RUN_FILE, EndlexError, UsageError
from endlex.reading import session_files


def is_run_directory(path: Path) -> bool:
    """Whether a directory holds a run."""
    return path.is_dir() and ((path / RUN_FILE).is_file() or bool(session_files(path)))


def find_run_directories(folder: Path) -> list[Path]:
    """Return the run directories at or below a folder, at most two levels deep."""
    levels = ("", "*/", "*/*/")
    return sorted({path.parent for at in levels for path in folder.glob(f"{at}{RUN_FILE}")})


@dataclass(frozen=True)
class LocalRuns:
    """The run directories that are known on this machine."""

    found: dict[Path, RunFile]
    gone: list[Path]
    """Directories in which a run was recorded, and where there is none now."""
    unreadable: dict[Path, str]
    """Directories that cannot be read, with the reason."""

    def __str__(self) -> str:
        said = [f"looked at {count(len(self.found), 'run')} on this machine"]
        if self.gone:
            places = ", ".join(map(str, self.gone[:5])) + (", ..." if self.gone[5:] else "")
            said.append(f"{len(self.gone):,} gone (deleted, or not mounted): {places}")
        said += [f"cannot read {place}: {reason}" for place, reason in self.unreadable.items()]
        return "\n".join(said)


def local_runs(words: Sequence[str] = ()) -> LocalRuns:
    """Find the run directories on this machine that words mean.

    Args:
        words: run directories, folders of some, or ids, names or project/name of runs here. If
            none is given: all runs in `runs_folder()`, and wherever `endlex.init` made some.

    Raises:
        UsageError: a word means none.
        EndlexError: a word is the name of several runs.
    """
    places = [*registered(), *find_run_directories(runs_folder())]
    if words:
        places = [place for word in words for place in _find_places(word)]
    found, gone, unreadable = dict[Path, RunFile](), list[Path](), dict[Path, str]()
    for directory in {place.resolve(): place for place in places}.values():
        try:
            owner = read_run_file(directory)
            if owner is not None:
                found[directory] = owner
            elif session_files(directory):
                unreadable[directory] = f"it has journals and no {RUN_FILE}"
            else:
                gone.append(directory)
        except (OSError, EndlexError) as error:
            unreadable[directory] = str(error)
    return LocalRuns(found if words else dict(sorted(found.items())), sorted(gone), unreadable)


def _find_places(word: str) -> list[Path]:
    place = Path(word)
    inside = [place] if is_run_directory(place) else find_run_directories(place)
    if inside:
        return inside
    found = [
        directory
        for directory, owner in local_runs().found.items()
        if word in (owner["run"], owner["name"], f"{owner['project']}/{owner['name']}")
    ]
    if len(found) > 1:
        listed = ", ".join(map(str, found))
        raise EndlexError(f"{word!r} is the name of {len(found)} runs here: give one of {listed}")
    if not found:
        raise UsageError(
            f"{word!r} is no run's directory (there is no {RUN_FILE} in it), and no run in "
            f"{runs_folder()} has that id or name: give one that is on this machine"
        )
    return found
