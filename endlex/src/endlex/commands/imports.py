"""`endlex import`: other tools' files become run directories, which `endlex sync` ships."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from endlex.client.directories import runs_folder
from endlex.commands.rendering import count, printable
from endlex.importers.run_directory import RunWriter
from endlex.protocol import EndlexError, UsageError

NOUNS = {"metrics": "metrics record", "text": "text", "table": "table", "media": "file"}
Task = tuple[Path, Callable[[], RunWriter | list[RunWriter]]]
"""What is imported, and how."""


def from_wandb(path: Path, project: str | None, to: Path | None) -> int:
    """Import every `.wandb` file at or below a path."""
    from endlex.importers.wandb import find_wandb_files, import_wandb

    root, files = to or runs_folder(), find_wandb_files(_existing(path))
    return _import_all((file, partial(import_wandb, file, root, project)) for file in files)


def from_tensorboard(path: Path, project: str | None, to: Path | None) -> int:
    """Import every directory with event files at or below a path."""
    from endlex.importers.tensorboard import find_event_directories, import_tensorboard, run_name

    top, root = _existing(path), to or runs_folder()
    if not top.is_dir():
        raise UsageError(f"{path} is a file: give the directory that holds the event files")
    group = project or top.resolve().name
    return _import_all(
        (place, partial(import_tensorboard, place, root, group, run_name(top, place)))
        for place in find_event_directories(top)
    )


def from_trackio(path: Path, project: str | None, to: Path | None) -> int:
    """Import every run of trackio's databases in a directory."""
    from endlex.importers.trackio import find_trackio_files, import_trackio

    root, files = to or runs_folder(), find_trackio_files(_existing(path))
    return _import_all((file, partial(import_trackio, file, root, project)) for file in files)


def from_neptune(path: Path, project: str | None, to: Path | None) -> int:
    """Import every run of neptune-exporter's Parquet files at or below a path."""
    from endlex.importers.neptune import find_neptune_runs, import_neptune

    root, runs = to or runs_folder(), find_neptune_runs(_existing(path))
    return _import_all((run[0], partial(import_neptune, run, root, project)) for run in runs)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    return path


def _import_all(tasks: Iterable[Task]) -> int:
    """Import one after the other; one that fails does not keep the others back."""
    imported: list[RunWriter] = []
    failed = False
    for place, task in tasks:
        try:
            done = task()
        except Exception as error:  # whatever a damaged file makes of a library
            failed = True
            known = isinstance(error, EndlexError | OSError)
            said = str(error) if known else f"{type(error).__name__}: {error}"
            print(f"{place}: not imported: {printable(said)}")
            continue
        for one in done if isinstance(done, list) else [done]:
            imported.append(one)
            shown = [kind for kind in NOUNS if one.counts[kind] or kind == "metrics"]
            counts = ", ".join(count(one.counts[kind], NOUNS[kind]) for kind in shown)
            print(f"{place} -> {one.directory}: {counts}")
            if one.skipped:
                left = ", ".join(f"{n:,} x {printable(what)}" for what, n in one.skipped.items())
                print(f"  left out: {left}")
    if imported:
        directories = " ".join(dict.fromkeys(shlex.quote(str(one.directory)) for one in imported))
        print(f"ship with: endlex sync {directories}")
    return 1 if failed else 0
