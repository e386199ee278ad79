"""`archerchat models`: list, rename, remove and prune the models on this machine."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from archerchat.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    list_models,
    prune_checkpoints,
    saved_at,
)
from archerchat.config import STAGES, Config, PositiveInt, StageName
from archerchat.console import build_console, build_table, bytes_text, duration_text
from archerchat.errors import UsageError
from archerchat.files import exclusive, remove_directory, write_json
from archerchat.home import Home, check_name
from archerchat.inference.loading import read_bits_per_byte
from archerchat.report.runs import RENAMES, read_renames


@dataclass(frozen=True)
class ListConfig:
    """List the models on this machine, by stage, the last saved first."""


@dataclass(frozen=True)
class RenameConfig:
    """Rename a model at all stages, with the results of its evaluations.

    `archerchat models rename OLD NEW`. Journals keep their names, and reports still find them.
    """

    old: str
    """Name of the model."""
    new: str
    """New name."""


@dataclass(frozen=True)
class ChangeConfig(Config):
    """Choose a model."""

    tag: str
    """Name of the model."""
    stage: StageName | None = None
    """Stage to change: base, sft or rl. Defaults to all."""


@dataclass(frozen=True)
class RemoveConfig(ChangeConfig):
    """Delete a model's checkpoints: `archerchat models remove TAG`.

    Journals, reports and evaluations stay.
    """

    yes: bool = False
    """Confirm the deletion."""


@dataclass(frozen=True)
class PruneConfig(ChangeConfig):
    """Delete a model's older checkpoints: `archerchat models prune TAG --keep-last 1`."""

    keep_last: PositiveInt = 1
    """Number of checkpoints to keep at each stage."""


def show(config: ListConfig, home: Home) -> None:
    """Print a table of the models."""
    table = build_table("stage", "model", "steps", "bits/byte", "size", "saved", num_texts=2)
    for stage in STAGES:
        found = [(saved_at(find_checkpoint(path)), path) for path in list_models(home, stage)]
        for moment, path in sorted(found, reverse=True):
            steps, bits = list_checkpoints(path), read_bits_per_byte(find_checkpoint(path))
            shown = ("… " if len(steps) > 2 else "") + ", ".join(map(str, steps[-2:]))
            measured = "–" if bits is None else f"{bits:.4f}"
            age = f"{duration_text(max(0.0, time.time() - moment / 1e9))} ago"
            table.add_row(stage, path.name, shown, measured, size_text(path), age)
    if table.row_count:
        build_console().print(table)
        print("Commands take the first of a stage unless --model-tag names another.")
    else:
        print(f"no models in {home.root}: train one (archerchat pretrain), or import one")


def rename(config: RenameConfig, home: Home) -> None:
    """Rename a model at all stages."""
    check_name(config.new, "model tag")
    sources = find_stages(home, config.old, None)
    results = [home.eval_dir(stage, config.old) for stage in STAGES]
    pairs = [(p, p.with_name(config.new)) for p in (*sources, *filter(Path.is_dir, results))]
    if taken := [target for _, target in pairs if target.exists()]:
        raise UsageError(f"{taken[0]} exists: choose another name, or remove that model first")
    with ExitStack() as locks:
        for path in sources:
            locks.enter_context(exclusive(path))
        for source, target in pairs:
            source.rename(target)
        entry = {"from": config.old, "to": config.new, "time": time.time()}
        write_json(home.root / RENAMES, [*read_renames(home), entry])
    for source, target in pairs:
        print(f"{source} is now {target}")


def remove(config: RemoveConfig, home: Home) -> None:
    """Delete a model's checkpoints."""
    found = {p: f"{p} ({size_text(p)})" for p in find_stages(home, config.tag, config.stage)}
    if not config.yes:
        raise UsageError(f"{', '.join(found.values())} would be deleted: confirm it by --yes")
    for path, text in found.items():
        with exclusive(path):
            remove_directory(path)
        print(f"removed {text}")


def prune(config: PruneConfig, home: Home) -> None:
    """Delete a model's older checkpoints."""
    for path in find_stages(home, config.tag, config.stage):
        before = list_checkpoints(path)
        with exclusive(path):
            prune_checkpoints(path, before[-1], config.keep_last)
        kept = list_checkpoints(path)
        steps = ", ".join(map(str, kept))
        print(f"{path}: {len(before) - len(kept)} checkpoint(s) deleted, kept steps {steps}")


def find_stages(home: Home, tag: str, stage: str | None) -> list[Path]:
    """Return the directories of a model, one for each stage that it went through."""
    stages = STAGES if stage is None else (stage,)
    known = [path for each in stages for path in list_models(home, each)]
    if found := [path for path in known if path.name == tag]:
        return found
    kind = f"{stage} model" if stage else "model"
    names = ", ".join(dict.fromkeys(path.name for path in known)) or "none"
    raise UsageError(f"no {kind} {tag!r} in {home.root}; there is {names}")


def size_text(path: Path) -> str:
    """Return the size of all files below a directory, for people."""
    return bytes_text(sum(f.stat().st_size for f in path.rglob("*") if f.is_file()))
