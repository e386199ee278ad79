"""`archerchat data download|build|info|identity`: text as shards, and an identity to learn."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.table import Table

from archerchat.config import Config, PositiveInt, Seed
from archerchat.console import LiveLine, build_console, build_table, bytes_text, duration_text
from archerchat.data.corpus import CorpusOptions, Group, build_corpus, find_recipe
from archerchat.data.folder import Reading, describe_files, list_files
from archerchat.data.hub import SOURCES, download_shards
from archerchat.data.shards import (
    MAKE_DATA,
    TEXT_COLUMN,
    Shard,
    data_directory,
    list_shards,
    list_sources,
    split_shards,
)
from archerchat.data.stdlib import describe_stdlib, iter_stdlib, list_stdlib, stdlib_directory
from archerchat.downloads import Report
from archerchat.errors import DataError, UsageError
from archerchat.files import explained_writes, remove_leftovers, write_bytes
from archerchat.home import Home
from archerchat.tasks.conversation import write_lines
from archerchat.tasks.identity import default_template, draw_identity, parse_template

STDLIB = "stdlib"
DEFAULT_SHARDS = 8
WRITABLE = "name a place that can be written"


@dataclass(frozen=True)
class DataDownloadConfig(Config):
    """Download text shards from the Hugging Face hub. Existing shards are kept."""

    source: Literal["climbmix", "fineweb-edu"] = "climbmix"
    """Data set to download; also the name of the data."""
    num_shards: PositiveInt | None = None
    """Number of train shards, at most 6542 (climbmix) or 1821 (fineweb-edu). Defaults to what
    --depth needs, or 8. The validation shard is always downloaded too."""
    depth: PositiveInt | None = None
    """Depth of the model to train; decides the number of shards."""
    workers: PositiveInt = 4
    """Files to download at a time."""
    endpoint: str | None = None
    """Address of another hub or mirror. Defaults to HF_ENDPOINT, or the hub itself."""


@dataclass(frozen=True)
class DataBuildConfig(Config):
    """Convert text files to Parquet shards. Existing identical shards are kept."""

    source: str
    """SOURCE: `stdlib` (this Python's own sources and documentation), or a file or folder of
    .parquet, .jsonl, .json, .csv, .txt or .md files, compressed (.gz, .zst, .bz2, .xz) or not."""
    name: str | None = None
    """Name of the data. Defaults to `stdlib` or the folder's name."""
    text_column: str = TEXT_COLUMN
    """Column or key that holds the documents."""
    skip_bad: bool = False
    """Leave out and list files and rows that cannot be read, instead of stopping."""
    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    force: bool = False
    """Replace existing data of this name. Runs that read it can no longer be resumed."""


@dataclass(frozen=True)
class DataInfoConfig(Config):
    """Print what a data source holds, or all of them."""

    data: str | None = None
    """Data source, or a directory of shards. Defaults to all sources under ARCHERCHAT_HOME."""
    shards: bool = False
    """Also list the shards."""


@dataclass(frozen=True)
class DataIdentityConfig(Config):
    """Write conversations in which the assistant says who it is, to mix into fine-tuning."""

    name: str = "Archer"
    """Name of the assistant."""
    creator: str = "the person who runs me"
    """Who trained the assistant, in its own words."""
    output: Path = Path("identity.jsonl")
    """File of JSON lines to write; an existing one is replaced."""
    num_conversations: PositiveInt = 1000
    """Number of conversations to write."""
    template: Path | None = None
    """Your own template (TOML). Defaults to the package's."""
    save_template: Path | None = None
    """Only write the package's template to this new file, for you to edit."""
    seed: Seed = 0
    """Random seed for drawing the conversations."""


def download(config: DataDownloadConfig, home: Home) -> None:
    """Download the shards that are missing."""
    console = build_console()
    directory, source = home.data_dir(config.source), SOURCES[config.source]
    num_shards = config.num_shards or DEFAULT_SHARDS
    if config.num_shards is None and config.depth is not None:
        from archerchat.planning.plan import shards_for_depth  # it imports torch

        num_shards = shards_for_depth(config.depth, source.num_shards - 1)
        console.print(f"depth {config.depth} trains on {num_shards} shards")
    remove_leftovers(directory)
    with LiveLine(console, "connecting") as line:
        fetched = download_shards(
            source,
            num_shards,
            directory,
            workers=config.workers,
            endpoint=config.endpoint,
            report=report_to(line, num_shards + 1),
            notify=console.print,
        )
    there = num_shards + 1 - len(fetched)
    console.print(f"downloaded {len(fetched)} shards, {there} already existed: {directory}")


def report_to(line: LiveLine, num_files: int) -> Report:
    """Return a function that shows how much of the files has arrived, the rate and the time left.

    Sizes that are not known yet are estimated by the mean of the known ones.
    """
    # By name: bytes that an earlier command fetched, which make no rate; bytes so far; size.
    files: dict[str, tuple[int, int, int]] = {}
    lock = threading.Lock()

    def report(name: str, arrived: int, size: int) -> None:
        with lock:
            files[name] = files.get(name, (arrived,))[0], arrived, size
            before, done, known = (sum(column) for column in zip(*files.values(), strict=True))
            finished = sum(arrived == size for _, arrived, size in files.values())
            total, rate = known * num_files / len(files), line.rate(max(1, done - before))
            line.show(
                f"{finished} of {num_files} shards, {done / 1e6:,.0f} of {total / 1e6:,.0f} "
                f"MB at {rate / 1e6:,.1f} MB/s, {duration_text((total - done) / rate)} left",
                done,
                total,
            )

    return report


def build(config: DataBuildConfig, home: Home) -> None:
    """Build shards from the standard library or from a folder of text."""
    console, directory = build_console(), home.data_dir(config.name or _default_name(config.source))
    reading = Reading(config.text_column, config.skip_bad)
    unchanged = "is built already: nothing to do"
    groups: Iterable[Group]
    held_out: Iterable[Group] = ()
    if config.source == STDLIB:
        root = stdlib_directory()
        files = list_stdlib(root)
        recipe, groups = describe_stdlib(root, files), iter_stdlib(root, files)
        # An update of Python changes the sources a little. Runs that read what an earlier one built
        # must not break because of that.
        there = None if config.force else find_recipe(directory)
        if there is not None and "python" in there and there != recipe:
            recipe = there
            unchanged = f"stays as {' '.join(there['python'])} built it: --force builds it again"
    else:
        root = Path(config.source).expanduser()
        folder = list_files(root)
        files = sorted([*folder.train, *folder.held_out])
        recipe = describe_files(root, files)
        if config.text_column != TEXT_COLUMN or config.skip_bad:
            recipe |= {"text_column": config.text_column, "skip_bad": config.skip_bad}
        for left_out in folder.left_out:
            console.print(f"left out: {left_out}")
        if folder.held_out:
            named = folder.held_out[0].relative_to(root)
            console.print(f"validation: {len(folder.held_out):,} files named so, such as {named}")
        groups = ([text] for text in reading.iter_texts(folder.train))
        held_out = ([text] for text in reading.iter_texts(folder.held_out))
    with LiveLine(console, f"building {directory.name}") as line:
        written = build_corpus(
            _counted(groups, line, directory.name),
            directory,
            recipe,
            config.corpus,
            held_out=held_out,
            input_bytes=sum(file.stat().st_size for file in files),
            force=config.force,
        )
    for sentence in reading.describe():
        console.print(sentence)
    console.print(_describe(directory) if written else f"{directory} {unchanged}")


def _default_name(source: str) -> str:
    if source == STDLIB:
        return STDLIB
    path = Path(source).expanduser().resolve()
    name = path.name if path.is_dir() else path.stem
    if name in {STDLIB, *SOURCES}:
        raise UsageError(
            f"{source} would be called {name!r}, which is another source's name: give a --name"
        )
    return name


def _counted(groups: Iterable[Group], line: LiveLine, name: str) -> Iterator[Group]:
    """Yield the groups, showing their number."""
    for number, group in enumerate(groups, start=1):
        line.show(f"building {name}: {number:,} read")
        yield group


def info(config: DataInfoConfig, home: Home) -> None:
    """Print a table of splits, shards, row groups, documents and bytes per source."""
    given = config.data
    directories = list_sources(home) if given is None else [data_directory(given, home)]
    if not directories:
        raise DataError(f"no data in {home.root / 'data'}: {MAKE_DATA}")
    for directory in directories:
        build_console().print(_describe(directory, list_each=config.shards))


def _describe(directory: Path, *, list_each: bool = False) -> Table:
    columns = ("split", "shards", "row groups", "documents", "text", "files")
    table = build_table(*columns, title=str(directory))
    splits = zip(("train", "validation"), split_shards(list_shards(directory)), strict=True)
    for split, shards in splits:
        measured = {}
        for path in shards:
            with Shard(path) as shard:
                figures = shard.num_row_groups, shard.num_documents, shard.text_bytes
                measured[f"  {path.stem}"] = *figures, path.stat().st_size
        sums = tuple(sum(column) for column in zip(*measured.values(), strict=True))
        rows = {split: sums} | (measured if list_each else {})
        for name, (row_groups, documents, *sizes) in rows.items():
            count = f"{len(shards):,}" if name == split else ""
            table.add_row(name, count, f"{row_groups:,}", f"{documents:,}", *map(bytes_text, sizes))
    return table


def identity(config: DataIdentityConfig, home: Home) -> None:
    """Draw the conversations and write them, one JSON object per line."""
    if config.save_template is not None:
        if config.save_template.exists():
            raise UsageError(f"{config.save_template} exists: name a new file for the template")
        with explained_writes(config.save_template, remedy=WRITABLE):
            write_bytes(config.save_template, default_template().encode())
        print(f"wrote the template to {config.save_template}")
        return
    values = {"name": config.name.strip(), "creator": config.creator.strip()}
    for flag, value in values.items():
        if not value:
            raise UsageError(f"--{flag} is empty: give the assistant's {flag}")
    text = default_template()
    if config.template is not None:
        try:
            text = config.template.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeError) as error:
            message = f"cannot read the template {config.template} ({error}): give a TOML file"
            raise DataError(message) from error
    template = parse_template(text, values, str(config.template or "the template"))
    conversations = draw_identity(template, config.num_conversations, config.seed)
    with explained_writes(config.output, remedy=WRITABLE):
        write_lines(config.output, conversations)
    print(f"wrote {len(conversations)} conversations of {values['name']} to {config.output}")
