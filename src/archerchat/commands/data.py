"""`archerchat data download|build|info`: get text as shards, and print what is there."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from archerchat.config import Config, PositiveInt
from archerchat.console import PLAIN_LINE_SECONDS, build_console, duration_text
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


@dataclass(frozen=True)
class DataDownloadConfig(Config):
    """Download shards from the Hugging Face hub. Existing shards are not fetched again."""

    source: Literal["climbmix", "fineweb-edu"] = "climbmix"
    """Data set to download; its shards are kept under this name."""
    num_shards: PositiveInt = 8
    """Number of train shards, of 6542 (climbmix) or 1821 (fineweb-edu). The validation shard is
    always downloaded too. `archerchat plan` says how many a model needs."""
    workers: PositiveInt = 4
    """Files to download at a time."""
    endpoint: str | None = None
    """Address of another hub or mirror. Defaults to HF_ENDPOINT, or the hub itself."""


@dataclass(frozen=True)
class DataBuildConfig(Config):
    """Convert text files to Parquet shards. Existing identical shards are kept."""

    source: str
    """SOURCE: `stdlib` (this Python's own sources and documentation), or a file or folder of
    .parquet, .jsonl (`text` in both), .txt or .md files."""
    name: str | None = None
    """Name of the data. Defaults to `stdlib` or the folder's name."""
    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    force: bool = False
    """Replace existing data of this name. Runs that read it can then not be resumed."""


@dataclass(frozen=True)
class DataInfoConfig(Config):
    """Print what a data source holds, or all of them."""

    data: str | None = None
    """Data source, or a directory of shards. Defaults to all sources under ARCHERCHAT_HOME."""
    shards: bool = False
    """Also print one line per shard."""


def download(config: DataDownloadConfig, home: Home) -> None:
    """Download the shards that are not there yet.

    Raises:
        UsageError: the source does not have that many shards.
        DataError: the hub cannot be reached, or the disk is full.
    """
    console = build_console()
    directory = home.data_dir(config.source)
    remove_leftovers(directory)
    progress = _DownloadProgress(console, config.num_shards + 1)
    with progress.bar:
        fetched = download_shards(
            SOURCES[config.source],
            config.num_shards,
            directory,
            workers=config.workers,
            endpoint=config.endpoint,
            report=progress.report,
            notify=console.print,
        )
    there = config.num_shards + 1 - len(fetched)
    console.print(f"fetched {len(fetched)} shards, {there} were there: {directory}")


def build(config: DataBuildConfig, home: Home) -> None:
    """Build shards from the standard library or from a folder of text.

    Raises:
        UsageError: the name belongs to data from elsewhere or, without `force`, to data that was
            built from other text or with other settings.
        DataError: there is nothing to read, a file is broken, or the disk is full.
    """
    console = build_console()
    directory = home.data_dir(config.name or _default_name(config.source))
    unchanged = "is built already: nothing to do"
    groups: Iterable[Group]
    if config.source == STDLIB:
        root = stdlib_directory()
        files = list_stdlib(root)
        recipe, groups = describe_stdlib(root, files), iter_stdlib(root, files)
        # An update of Python changes the sources a little; that is no reason to break the runs that
        # read what an earlier one built.
        there = None if config.force else find_recipe(directory)
        if there is not None and "python" in there and there != recipe:
            recipe = there
            unchanged = f"stays as {' '.join(there['python'])} built it: --force builds it again"
    else:
        root = Path(config.source).expanduser()
        files = list_files(root)
        recipe, groups = describe_files(root, files), ([text] for text in iter_files(files))
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}: {task.completed:,} read"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        written = build_corpus(
            progress.track(groups, description=f"building {directory.name}"),
            directory,
            recipe,
            config.corpus,
            input_bytes=sum(file.stat().st_size for file in files),
            force=config.force,
        )
    console.print(_describe(directory) if written else f"{directory} {unchanged}")


def info(config: DataInfoConfig, home: Home) -> None:
    """Print a table of sources, splits, shards, row groups, documents and bytes.

    Raises:
        DataError: there is no data, or a shard is broken.
    """
    if config.data is not None:
        directories = [data_directory(config.data, home)]
    elif not (directories := list_sources(home)):
        raise DataError(f"no data in {home.root / 'data'}: {MAKE_DATA}")
    console = build_console()
    for directory in directories:
        console.print(_describe(directory, list_each=config.shards))


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


def _describe(directory: Path, *, list_each: bool = False) -> Table:
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
        counts = [shard.num_row_groups, shard.num_documents, shard.text_bytes]
        return [*counts, path.stat().st_size]


def _format(figures: Sequence[int]) -> list[str]:
    row_groups, documents, text, size = figures
    return [f"{row_groups:,}", f"{documents:,}", f"{text / 1e6:,.1f}", f"{size / 1e6:,.1f}"]


class _DownloadProgress:
    """Show bytes, rate and time left: a live line on a terminal, plain lines elsewhere.

    Sizes that are not known yet are taken to be the mean of the known ones.
    """

    def __init__(self, console: Console, num_files: int) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._num_files, self._lock = num_files, threading.Lock()
        self._task = self.bar.add_task(f"0 of {num_files} shards")
        self._files: dict[str, tuple[int, int, int]] = {}
        """By name: bytes that had arrived at first, that have arrived now, and size."""
        self._printed = self._began = time.monotonic()

    def report(self, name: str, arrived: int, size: int) -> None:
        with self._lock:
            first, *_ = self._files.get(name, (arrived,))
            self._files[name] = (first, arrived, size)
            files = self._files.values()
            starts, arrivals, sizes = (sum(column) for column in zip(*files, strict=True))
            finished = sum(done == size for _, done, size in files)
            # What an earlier command had fetched is not part of this one's rate.
            completed = arrivals - starts
            total = sizes * self._num_files / len(self._files) - starts
            self._show(f"{finished} of {self._num_files} shards", completed, total)

    def _show(self, files: str, completed: int, total: float) -> None:
        self.bar.update(self._task, description=files, completed=completed, total=total)
        now = time.monotonic()
        if self.bar.disable and now - self._printed >= PLAIN_LINE_SECONDS:
            self._printed = now
            rate = max(completed, 1) / (now - self._began)
            self.bar.console.print(
                f"{files}, {completed / 1e6:,.0f} of {total / 1e6:,.0f} MB at "
                f"{rate / 1e6:,.1f} MB/s, {duration_text((total - completed) / rate)} left"
            )
