"""`endlex import`: other tools' files become run directories, which `endlex sync` ships."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from endlex.client.run_directory import runs_folder
from endlex.commands.rendering import count, printable
from endlex.commands.usage import UsageError
from endlex.importers.run_directory import Imported
from endlex.protocol import EndlexError


def from_wandb(path: Path, project: str | None, to: Path | None) -> int:
    """Import every `.wandb` file at or below a path."""
    from endlex.importers.wandb import find_wandb_files, import_wandb

    root = to or runs_folder()
    files = find_wandb_files(_existing(path))
    return _import_all([(file, partial(import_wandb, file, root, project)) for file in files])


def from_tensorboard(path: Path, project: str | None, to: Path | None) -> int:
    """Import every directory with event files at or below a path."""
    from endlex.importers.tensorboard import find_event_directories, import_tensorboard, run_name

    root = to or runs_folder()
    top = _existing(path)
    if not top.is_dir():
        raise UsageError(f"{path} is a file: give the directory that holds the event files")
    group = project or top.resolve().name
    return _import_all(
        [
            (place, partial(import_tensorboard, place, root, group, run_name(top, place)))
            for place in find_event_directories(top)
        ]
    )


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    return path


def _import_all(tasks: Sequence[tuple[Path, Callable[[], Imported]]]) -> int:
    """Import one after the other; one that fails does not keep the others back."""
    imported: list[Imported] = []
    failed = 0
    for place, task in tasks:
        try:
            done = task()
        except EndlexError as error:
            failed += 1
            print(f"{place}: not imported: {error}")
            continue
        imported.append(done)
        counts = ", ".join(count(done.counts[kind], noun) for kind, noun in _shown(done))
        print(f"{place} -> {done.directory}: {counts}")
        if done.skipped:
            left = ", ".join(f"{n:,} x {printable(what)}" for what, n in done.skipped.items())
            print(f"  left out: {left}")
    if imported:
        directories = " ".join(shlex.quote(str(done.directory)) for done in imported)
        print(f"ship with: endlex sync {directories}")
    return 1 if failed else 0


def _shown(done: Imported) -> list[tuple[str, str]]:
    nouns = {"metrics": "metrics record", "text": "text", "table": "table"}
    return [(kind, noun) for kind, noun in nouns.items() if done.counts[kind] or kind == "metrics"]
