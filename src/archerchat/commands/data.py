"""`archerchat data download|build|info`: get text as shards, and see what is there."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from archerchat.console import build_console
from archerchat.data.corpus import CorpusOptions, Group, build_corpus, find_recipe
from archerchat.data.folder import describe_files, iter_files, list_files
from archerchat.data.hub import SOURCES, download_shards
from archerchat.data.shards import (
    MAKE_DATA,
    Shard,
    data_directory,
    list_shards,
    list_sources,
    split_shards,
)
from archerchat.data.stdlib import describe_stdlib, iter_stdlib, list_stdlib, stdlib_directory
from archerchat.errors import DataError, UsageError
from archerchat.files import remove_leftovers
from archerchat.home import Home

STDLIB = "stdlib"
PLAIN_LINE_SECONDS = 10.0


@dataclass(frozen=True)
class DataDownloadConfig:
    """Download shards from the Hugging Face hub; what is there already is not fetched again."""

    source: Literal["climbmix", "fineweb-edu"] = "climbmix"
    """Which data set; its shards are kept under this name."""
    num_shards: int = 8
    """How many train shards, of 6542 (climbmix) or 1821 (fineweb-edu); the validation shard
    always comes too. `archerchat plan` says how many a model needs."""
    workers: int = 4
    """How many files to download at a time."""
    endpoint: str | None = None
    """Address of another hub or mirror; by default HF_ENDPOINT, or the hub itself."""


@dataclass(frozen=True)
class DataBuildConfig:
    """Turn text into shards; building the same again does nothing, and what is there stays."""

    source: str
    """SOURCE: `stdlib` (this Python's own sources and documentation), or a file or folder of
    .parquet, .jsonl (`text` in both), .txt or .md files."""
    name: str | None = None
    """What to call the data; by default `stdlib` or the folder's name."""
    val_fraction: float = 0.05
    """Share of the documents that becomes the validation shard, at most 8192 documents."""
    val_documents: int | None = None
    """How many documents become the validation shard, instead of a share."""
    documents_per_row_group: int | None = None
    """Documents read at a time; by default 256, or fewer so that 8 ranks can share a split."""
    seed: int = 0
    """Another seed shuffles and splits the documents otherwise."""
    force: bool = False
    """Build again and replace the data of this name; runs that read it cannot be resumed then."""


@dataclass(frozen=True)
class DataInfoConfig:
    """Print what is in a data source, or in all of them."""

    data: str | None = None
    """Data source, or a directory of shards; by default all sources under ARCHERCHAT_HOME."""
    shards: bool = False
    """Print a line for each shard, too."""


def download(config: DataDownloadConfig, home: Home) -> None:
    """Download the shards that are not there yet.

    Raises:
        UsageError: the source has no such number of shards.
        DataError: the hub cannot be reached, or the disk is full.
    """
    console = build_console()
    directory = home.data_dir(config.source)
    remove_leftovers(directory)
    with _DownloadProgress(console, config.num_shards + 1) as progress:
        fetched = download_shards(
            SOURCES[config.source],
            config.num_shards,
            directory,
            workers=config.workers,
            endpoint=config.endpoint,
            report=progress.report,
            notify=lambda message: console.print(message, highlight=False, markup=False),
        )
    there = config.num_shards + 1 - len(fetched)
    console.print(
        f"fetched {len(fetched)} shards, {there} were there: {directory}", highlight=False
    )


def build(config: DataBuildConfig, home: Home) -> None:
    """Build shards from the standard library or from a folder of text.

    Raises:
        UsageError: an option is out of range, or the name belongs to data from elsewhere or,
            without `force`, to data that was built otherwise.
        DataError: there is nothing to read, a file is broken, or the disk is full.
    """
    console = build_console()
    options = CorpusOptions(
        val_fraction=config.val_fraction,
        val_documents=config.val_documents,
        documents_per_row_group=config.documents_per_row_group,
        seed=config.seed,
    )
    directory = home.data_dir(config.name or _default_name(config.source))
    unchanged = "is built already: nothing to do"
    groups: Iterable[Group]
    if config.source == STDLIB:
        root = stdlib_directory()
        files = list_stdlib(root)
        recipe, groups = describe_stdlib(root, files), iter_stdlib(root, files)
        other = None if config.force else _find_other_stdlib(directory, recipe)
        if other is not None:
            recipe = other
            unchanged = f"stays as {' '.join(other['python'])} built it: --force builds it anew"
    else:
        root = Path(config.source).expanduser()
        files = list_files(root)
        recipe, groups = describe_files(root, files), ([text] for text in iter_files(files))
    with _build_progress(console) as progress:
        written = build_corpus(
            progress.track(groups, description=f"building {directory.name}"),
            directory,
            recipe,
            options,
            input_bytes=sum(file.stat().st_size for file in files),
            force=config.force,
        )
    if not written:
        console.print(f"{directory} {unchanged}", highlight=False)
        return
    console.print(_describe(directory, list_each=False))


def info(config: DataInfoConfig, home: Home) -> None:
    """Print a table of sources, splits, shards, row groups, documents and bytes.

    Raises:
        DataError: there is no data, or a shard is broken.
    """
    if config.data is not None:
        directories = [data_directory(config.data, home)]
    else:
        directories = list_sources(home)
        if not directories:
            raise DataError(f"no data in {home.root / 'data'}: {MAKE_DATA}")
    console = build_console()
    for directory in directories:
        console.print(_describe(directory, list_each=config.shards))


def _find_other_stdlib(directory: Path, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the recipe of the standard library's corpus there if another Python built it.

    An update of Python changes the sources a little; that is no reason to break the runs that
    read what an earlier one built.
    """
    there = find_recipe(directory)
    return there if there is not None and "python" in there and there != recipe else None


def _default_name(source: str) -> str:
    if source == STDLIB:
        return STDLIB
    path = Path(source).expanduser().resolve()
    name = path.name if path.is_dir() else path.stem
    if name in {STDLIB, *SOURCES}:
        raise UsageError(
            f"{source} would be called {name!r}, which is the name of another source: give a --name"
        )
    return name


def _describe(directory: Path, *, list_each: bool) -> Table:
    table = Table("split", title=str(directory), title_justify="left")
    for column in ("shards", "row groups", "documents", "text MB", "file MB"):
        table.add_column(column, justify="right")
    train, validation = split_shards(list_shards(directory))
    for split, shards in (("train", train), ("validation", validation)):
        measured = [_measure(shard) for shard in shards]
        totals = [sum(figures) for figures in zip(*measured, strict=True)]
        table.add_row(split, f"{len(shards):,}", *_format(totals))
        if list_each:
            for shard, figures in zip(shards, measured, strict=True):
                table.add_row(f"  {shard.stem}", "", *_format(figures))
    return table


def _measure(path: Path) -> list[int]:
    with Shard(path) as shard:
        return [
            shard.num_row_groups,
            shard.num_documents,
            shard.text_bytes,
            path.stat().st_size,
        ]


def _format(figures: Sequence[int]) -> list[str]:
    row_groups, documents, text, size = figures
    return [f"{row_groups:,}", f"{documents:,}", f"{text / 1e6:,.1f}", f"{size / 1e6:,.1f}"]


def _build_progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}: {task.completed:,} read"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class _DownloadProgress:
    """Show bytes, rate and time left: a live line on a terminal, plain lines elsewhere.

    Sizes that are not known yet are taken to be the mean of the known ones.
    """

    def __init__(self, console: Console, num_files: int) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._num_files = num_files
        self._task: TaskID | None = None
        self._lock = threading.Lock()
        self._starts: dict[str, int] = {}
        self._arrived: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._printed = self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def report(self, name: str, arrived: int, size: int) -> None:
        with self._lock:
            self._starts.setdefault(name, arrived)
            self._arrived[name], self._sizes[name] = arrived, size
            finished = sum(self._arrived[name] == size for name, size in self._sizes.items())
            # What an earlier command had fetched is not part of this one's rate.
            completed = sum(self._arrived.values()) - sum(self._starts.values())
            known = sum(self._sizes.values())
            total = known * self._num_files / len(self._sizes) - sum(self._starts.values())
            self._show(f"{finished} of {self._num_files} shards", completed, total)

    def _show(self, files: str, completed: int, total: float) -> None:
        if self._task is None:
            self._task = self._bar.add_task(files)
        self._bar.update(self._task, description=files, completed=completed, total=total)
        now = time.monotonic()
        if self._bar.disable and now - self._printed >= PLAIN_LINE_SECONDS:
            self._printed = now
            rate = max(completed, 1) / (now - self._began)
            self._bar.console.print(
                f"{files}, {completed / 1e6:,.0f} of {total / 1e6:,.0f} MB at "
                f"{rate / 1e6:,.1f} MB/s, {(total - completed) / rate / 60:,.0f} min left",
                highlight=False,
            )
