"""`archerchat tokenizer train|eval`: learn a vocabulary, and see how well it compresses."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from archerchat.console import build_console
from archerchat.data.shards import data_directory, iter_documents, list_shards, split_shards
from archerchat.errors import DataError, UsageError, require_positive
from archerchat.files import write_bytes, write_json
from archerchat.home import Home
from archerchat.tokenizer.bpe import (
    SPECIAL_TOKENS,
    Phase,
    Tokenizer,
    find_tokenizer,
    save_new_tokenizer,
    train_tokenizer,
)
from archerchat.tokenizer.compression import (
    GPT2,
    GPT4,
    SAMPLES,
    Compression,
    PublishedVocabulary,
    Vocabulary,
    measure_compression,
)

OURS = "ArcherChat"
PLAIN_LINE_SECONDS = 10.0
END_BYTES = 65_536


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """Learn a tokenizer from the train shards of a data source."""

    data: str = "climbmix"
    """Data source, or a directory of Parquet shards; the last shard is validation, not read."""
    name: str = "default"
    """What to call the tokenizer; it is saved under this name."""
    vocab_size: int = 32768
    """Number of token ids, the nine special tokens included."""
    max_chars: int = 2_000_000_000
    """Stop reading after so many characters."""
    doc_cap: int = 10_000
    """Read only so many characters of each document."""
    force: bool = False
    """Train again and replace the tokenizer of this name, if there is one."""


@dataclass(frozen=True)
class TokenizerEvalConfig:
    """Compare a tokenizer's compression with GPT-2's and GPT-4's."""

    name: str = "default"
    """The tokenizer's name."""
    data: str | None = None
    """Data source or directory of shards to compress; by default what it was trained on."""
    gpt2_ranks: Path | None = None
    """tiktoken's r50k_base.tiktoken; checked, then kept in the cache for the next time."""
    gpt4_ranks: Path | None = None
    """tiktoken's cl100k_base.tiktoken; checked, then kept in the cache for the next time."""
    max_chars: int = 2_000_000
    """Measure on so many characters of train text and of validation text."""
    json: Path | None = None
    """Also write the figures to this file."""


def train(config: TokenizerTrainConfig, home: Home) -> None:
    """Train a tokenizer and save it under its name; does nothing if that was already done.

    Raises:
        UsageError: a number is too small, there is no such data, or another tokenizer has the
            name and `force` is off.
        DataError: there are not two shards, one is broken, or their text is too short.
        TokenizerError: what is there under this name is broken, or the disk is full.
    """
    require_positive(config, "max_chars", "doc_cap")
    console = build_console()
    directory = home.tokenizer_dir(config.name)
    data = data_directory(config.data, home)
    shards, _ = split_shards(list_shards(data))
    if directory.exists() and not config.force:
        _require_same(Tokenizer.load(directory), config, shards)
        console.print(f"tokenizer {config.name!r} is there already: nothing to do", highlight=False)
        return

    shards_read: list[Path] = []
    started = time.monotonic()
    with _progress(console, config.vocab_size - 256 - len(SPECIAL_TOKENS)) as progress:
        tokenizer = train_tokenizer(
            _iter_recorded(shards, shards_read),
            config.vocab_size,
            max_chars=config.max_chars,
            document_chars=config.doc_cap,
            on_progress=progress.report,
        )
    tokenizer.provenance = {
        "data": str(data.resolve()),
        "vocab_size": config.vocab_size,
        "max_chars": config.max_chars,
        "doc_cap": config.doc_cap,
        "characters": progress.characters,
        "shards": [_identify(shard) for shard in shards_read],
    }
    save_new_tokenizer(tokenizer, directory)
    console.print(
        f"trained {tokenizer.vocab_size:,} tokens on {progress.characters:,} characters in "
        f"{time.monotonic() - started:.1f} s: {directory}",
        highlight=False,
    )


def evaluate(config: TokenizerEvalConfig, home: Home) -> None:
    """Print a table of bytes per token, by text and vocabulary, and write it as JSON if asked.

    Raises:
        UsageError: the tokenizer, the data or a ranks file that was asked for does not exist.
        TokenizerError: the tokenizer or a ranks file is broken.
        DataError: the data that was asked for is broken.
    """
    console = build_console()
    tokenizer = Tokenizer.load(find_tokenizer(home, config.name))
    size = int((tokenizer.token_bytes > 0).sum())
    vocabularies = [Vocabulary(OURS, size, tokenizer.encode)]
    for published, given, flag in (
        (GPT2, config.gpt2_ranks, "--gpt2-ranks"),
        (GPT4, config.gpt4_ranks, "--gpt4-ranks"),
    ):
        vocabulary = _find_published(published, given, flag, home.cache_dir, console)
        if vocabulary is not None:
            vocabularies.append(vocabulary)
    texts = _shard_texts(config, tokenizer, home, console)
    texts |= {name: [text] for name, text in SAMPLES.items()}
    rows = [measure_compression(name, text, vocabularies) for name, text in texts.items()]
    console.print(_table(rows, vocabularies))
    if config.json is not None:
        write_json(config.json, _as_json(config.name, tokenizer, rows, vocabularies))


class _TrainingProgress:
    """Say how far training is: a live line on a terminal, a plain one now and then elsewhere."""

    def __init__(self, bar: Progress, num_merges: int) -> None:
        self.characters = 0
        self._bar = bar
        self._task = bar.add_task("reading")
        self._num_merges = num_merges
        self._started = self._shown = time.monotonic()
        self._interval = PLAIN_LINE_SECONDS if bar.disable else 0.2

    def report(self, phase: Phase, characters: int) -> None:
        self.characters = characters
        now = time.monotonic()
        if phase == "read" and now - self._shown < self._interval:
            return
        self._shown = now
        rate = characters / max(now - self._started, 1e-9)
        line = f"read {characters / 1e6:,.1f} M characters at {rate / 1e6:,.2f} M/s"
        if phase == "merge":
            line += f", learning {self._num_merges:,} merges"
        self._bar.update(self._task, description=line)
        if self._bar.disable:
            self._bar.console.print(line, highlight=False)


@contextlib.contextmanager
def _progress(console: Console, num_merges: int) -> Iterator[_TrainingProgress]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield _TrainingProgress(bar, num_merges)


def _iter_recorded(shards: Iterable[Path], shards_read: list[Path]) -> Iterator[str]:
    """Yield the documents of `shards`, noting in `shards_read` each one that is opened."""
    for shard in shards:
        shards_read.append(shard)
        yield from iter_documents([shard])


def _identify(shard: Path) -> dict[str, Any]:
    """Tell a shard from others without reading it all: name, size, hash of its two ends.

    The end of a Parquet file holds the size and place of everything in it.
    """
    size = shard.stat().st_size
    with shard.open("rb") as file:
        ends = file.read(END_BYTES)
        file.seek(max(0, size - END_BYTES))
        ends += file.read()
    return {"name": shard.name, "bytes": size, "ends_sha256": hashlib.sha256(ends).hexdigest()}


def _require_same(
    existing: Tokenizer, config: TokenizerTrainConfig, shards: Sequence[Path]
) -> None:
    """Raise unless `config` and `shards` would give the existing tokenizer again."""
    recorded = existing.provenance
    differences = [
        f"--{key.replace('_', '-')} {recorded.get(key)} (now {getattr(config, key)})"
        for key in ("vocab_size", "max_chars", "doc_cap")
        if recorded.get(key) != getattr(config, key)
    ]
    if not differences and not _reads_same_text(recorded, shards):
        differences = [f"other text ({recorded['data']}, now {config.data})"]
    if differences:
        raise UsageError(
            f"there is a tokenizer {config.name!r} with {', '.join(differences)}: choose another "
            "--name, or replace it with --force (models trained with it cannot use the new one)"
        )


def _reads_same_text(recorded: Mapping[str, Any], shards: Sequence[Path]) -> bool:
    """Whether training would read the recorded shards: later ones are free to appear meanwhile."""
    before = recorded["shards"]
    if len(before) != len(shards) and recorded["characters"] < recorded["max_chars"]:
        return False
    return bool(before == [_identify(shard) for shard in shards[: len(before)]])


def _find_published(
    published: PublishedVocabulary, given: Path | None, flag: str, cache_dir: Path, console: Console
) -> Vocabulary | None:
    """Load a vocabulary from the file given (and cache it) or the cache; say so if neither is."""
    cached = cache_dir / published.file_name
    if given is not None:
        if not given.is_file():
            raise UsageError(f"{flag} {given} is not a file: give tiktoken's {published.file_name}")
        vocabulary = published.load(given)
        if not cached.exists():
            with contextlib.suppress(OSError):
                write_bytes(cached, given.read_bytes())
        return vocabulary
    if cached.is_file():
        return published.load(cached)
    console.print(
        f"no {published.title} vocabulary to compare with: give {published.file_name} with {flag}, "
        f"or put it in {cache_dir}",
        highlight=False,
    )
    return None


def _shard_texts(
    config: TokenizerEvalConfig, tokenizer: Tokenizer, home: Home, console: Console
) -> dict[str, list[str]]:
    """Return documents of the first train shards and of the validation shard, if there is data."""
    data = config.data or tokenizer.provenance.get("data")
    try:
        if data is None:
            raise DataError("the tokenizer does not say what it was trained on")
        train, validation = split_shards(list_shards(data_directory(data, home)))
    except (DataError, UsageError) as error:
        if config.data is not None:
            raise
        console.print(f"built-in samples only: {error}", highlight=False)
        return {}
    return {
        "train": _take(iter_documents(train), config.max_chars),
        "validation": _take(iter_documents(validation), config.max_chars),
    }


def _take(documents: Iterable[str], max_chars: int) -> list[str]:
    taken = []
    for document in documents:
        taken.append(document[:max_chars])
        max_chars -= len(document)
        if max_chars <= 0:
            break
    return taken


def _table(rows: Sequence[Compression], vocabularies: Sequence[Vocabulary]) -> Table:
    table = Table(
        title="Bytes per token (in brackets: ours divided by theirs)", title_justify="left"
    )
    table.add_column("text")
    table.add_column("bytes", justify="right")
    for vocabulary in vocabularies:
        table.add_column(f"{vocabulary.title}\n{vocabulary.size:,} tokens", justify="right")
    for row in rows:
        cells = [f"{row.bytes_per_token(OURS):.2f}"]
        for other in vocabularies[1:]:
            ratio = row.ratio(OURS, other.title)
            cells.append(f"{row.bytes_per_token(other.title):.2f} ({ratio:.2f}x)")
        table.add_row(row.text, f"{row.num_bytes:,}", *cells)
    return table


def _as_json(
    name: str,
    tokenizer: Tokenizer,
    rows: Sequence[Compression],
    vocabularies: Sequence[Vocabulary],
) -> dict[str, Any]:
    titles = [vocabulary.title for vocabulary in vocabularies]
    return {
        "tokenizer": name,
        "fingerprint": tokenizer.fingerprint,
        "vocabulary_sizes": {vocabulary.title: vocabulary.size for vocabulary in vocabularies},
        "texts": {
            row.text: {
                "bytes": row.num_bytes,
                "tokens": dict(row.tokens),
                "bytes_per_token": {title: row.bytes_per_token(title) for title in titles},
                "ratio": {title: row.ratio(OURS, title) for title in titles[1:]},
            }
            for row in rows
        },
    }
