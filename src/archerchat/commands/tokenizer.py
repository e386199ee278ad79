"""`archerchat tokenizer train|eval`: train a tokenizer, and measure its compression."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archerchat.config import Config, PositiveInt
from archerchat.console import LiveLine, build_console, build_table
from archerchat.data.shards import data_directory, iter_documents, list_shards, split_shards
from archerchat.errors import DataError, UsageError
from archerchat.files import write_bytes, write_json
from archerchat.home import Home
from archerchat.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer, find_tokenizer, train_tokenizer
from archerchat.tokenizer.compression import (
    GPT2,
    GPT4,
    PublishedVocabulary,
    load_samples,
    measure_compression,
)

OURS = "ArcherChat"
END_BYTES = 65_536
SETTINGS = ("vocab_size", "max_chars", "doc_cap")


@dataclass(frozen=True)
class TokenizerTrainConfig(Config):
    """Train a tokenizer on the train shards of a data source."""

    data: str = "climbmix"
    """Data source or directory of Parquet shards. The last shard, for validation, is not read."""
    name: str = "default"
    """Name to save the tokenizer under."""
    vocab_size: int = 32768
    """Number of token ids, including the nine special tokens."""
    max_chars: PositiveInt = 2_000_000_000
    """Characters to read in all."""
    doc_cap: PositiveInt = 10_000
    """Characters to read per document; the rest of a longer one is ignored."""
    force: bool = False
    """Train again and replace an existing tokenizer of this name."""


@dataclass(frozen=True)
class TokenizerEvalConfig(Config):
    """Compare a tokenizer's compression with GPT-2's and GPT-4's."""

    name: str = "default"
    """Name of the tokenizer."""
    data: str | None = None
    """Data source or directory of shards to compress. Defaults to the tokenizer's training data."""
    gpt2_ranks: Path | None = None
    """File r50k_base.tiktoken of tiktoken. It is verified and kept in the cache for later runs."""
    gpt4_ranks: Path | None = None
    """File cl100k_base.tiktoken of tiktoken. It is verified and kept in the cache for later
    runs."""
    max_chars: PositiveInt = 2_000_000
    """Characters to measure of the train text, and as many of the validation text."""
    json: Path | None = None
    """Also write the figures to this file."""


def train(config: TokenizerTrainConfig, home: Home) -> None:
    """Train a tokenizer and save it; do nothing if it exists with the same settings."""
    console = build_console()
    directory = home.tokenizer_dir(config.name)
    data = data_directory(config.data, home)
    shards, _ = split_shards(list_shards(data))
    if directory.exists() and not config.force:
        _require_same(Tokenizer.load(directory), config, shards)
        console.print(f"tokenizer {config.name!r} already exists: nothing to do")
        return
    merges = config.vocab_size - 256 - len(SPECIAL_TOKENS)
    settings = {name: getattr(config, name) for name in SETTINGS}
    made_from = {"data": str(data.resolve()), **settings, "characters": 0, "shards": list[Any]()}

    def iter_texts() -> Iterator[str]:
        for shard in shards:
            made_from["shards"].append(_identify(shard))
            yield from iter_documents([shard])

    def report(phase: str, read: int) -> None:
        made_from["characters"] = read
        text = f"read {read / 1e6:,.1f} M characters at {line.rate(read) / 1e6:,.2f} M/s"
        text += f", learning {merges:,} merges" if phase == "merge" else ""
        line.show(text, always=phase == "merge")

    started = time.monotonic()
    with LiveLine(console, "reading") as line:
        tokenizer = train_tokenizer(
            iter_texts(),
            config.vocab_size,
            max_chars=config.max_chars,
            document_chars=config.doc_cap,
            on_progress=report,
        )
    tokenizer.provenance = made_from
    tokenizer.save(directory)
    console.print(
        f"trained {tokenizer.vocab_size:,} tokens on {made_from['characters']:,} characters in "
        f"{time.monotonic() - started:.1f} s: {directory}"
    )


def _require_same(
    existing: Tokenizer, config: TokenizerTrainConfig, shards: Sequence[Path]
) -> None:
    """Raise unless `config` and `shards` would give the existing tokenizer again."""
    recorded = existing.provenance
    differences = [
        f"--{name.replace('_', '-')} {recorded.get(name)} (now {getattr(config, name)})"
        for name in SETTINGS
        if recorded.get(name) != getattr(config, name)
    ]
    if not differences:
        before = recorded["shards"]
        # Shards that were added later count only if there was less text than asked for.
        same = len(before) == len(shards) or recorded["characters"] >= recorded["max_chars"]
        if not same or before != [_identify(shard) for shard in shards[: len(before)]]:
            differences = [f"other text ({recorded['data']}, now {config.data})"]
    if differences:
        raise UsageError(
            f"there is a tokenizer {config.name!r} with {', '.join(differences)}: choose another "
            "--name, or replace it with --force (models trained with it cannot use the new one)"
        )


def _identify(shard: Path) -> dict[str, Any]:
    """Identify a shard without reading all of it: by name, size, and a hash of both ends.

    The end of a Parquet file holds the size and place of everything in it.
    """
    size = shard.stat().st_size
    with shard.open("rb") as file:
        ends = file.read(END_BYTES)
        file.seek(max(0, size - END_BYTES))
        ends += file.read()
    return {"name": shard.name, "bytes": size, "ends_sha256": hashlib.sha256(ends).hexdigest()}


def evaluate(config: TokenizerEvalConfig, home: Home) -> None:
    """Print, and optionally write, a table of bytes per token by text and vocabulary."""
    tokenizer = Tokenizer.load(find_tokenizer(home, config.name))
    vocabularies = {OURS: tokenizer}
    for published, given in ((GPT2, config.gpt2_ranks), (GPT4, config.gpt4_ranks)):
        if (found := _find_published(published, given, home.cache_dir)) is not None:
            vocabularies[published.title] = found
    sizes = {title: int((each.token_bytes > 0).sum()) for title, each in vocabularies.items()}
    encoders = {title: each.encode for title, each in vocabularies.items()}
    documents = _shard_texts(config, tokenizer, home)
    documents |= {name: [text] for name, text in load_samples().items()}
    rows = [measure_compression(name, text, encoders) for name, text in documents.items()]
    columns = (f"{title}\n{size:,} tokens" for title, size in sizes.items())
    title = "Bytes per token (in brackets: ours divided by theirs)"
    table = build_table("text", "bytes", *columns, title=title)
    texts: dict[str, Any] = {}
    for row in rows:
        rates = {title: row.bytes_per_token(title) for title in sizes}
        ratios = {title: row.ratio(OURS, title) for title in sizes if title != OURS}
        cells = (f"{rates[title]:.2f} ({ratio:.2f}x)" for title, ratio in ratios.items())
        table.add_row(row.text, f"{row.num_bytes:,}", f"{rates[OURS]:.2f}", *cells)
        counts = {"bytes": row.num_bytes, "tokens": row.tokens}
        texts[row.text] = counts | {"bytes_per_token": rates, "ratio": ratios}
    build_console().print(table)
    if config.json is not None:
        about = {"tokenizer": config.name, "fingerprint": tokenizer.fingerprint}
        write_json(config.json, about | {"vocabulary_sizes": sizes, "texts": texts})


def _find_published(
    published: PublishedVocabulary, given: Path | None, cache_dir: Path
) -> Tokenizer | None:
    """Load a vocabulary from the given file, and cache the file, or from the cache."""
    cached = cache_dir / published.file_name
    source, flag = given or cached, f"--{published.title.lower().replace('-', '')}-ranks"
    if given and not given.is_file():
        raise UsageError(f"{flag} {given} is not a file: give tiktoken's {published.file_name}")
    if not source.is_file():
        print(
            f"no {published.title} vocabulary to compare with: give {published.file_name} with "
            f"{flag}, or put it in {cache_dir}"
        )
        return None
    vocabulary = published.load(source)
    if not cached.exists():
        with contextlib.suppress(OSError):
            write_bytes(cached, source.read_bytes())
    return vocabulary


def _shard_texts(
    config: TokenizerEvalConfig, tokenizer: Tokenizer, home: Home
) -> dict[str, list[str]]:
    """Return documents of the first train shards and of the validation shard, if there is data."""
    data = config.data or tokenizer.provenance.get("data")
    try:
        if data is None:
            raise DataError("the tokenizer does not say what it was trained on")
        splits = split_shards(list_shards(data_directory(data, home)))
    except (DataError, UsageError) as error:
        if config.data is not None:
            raise
        print(f"built-in samples only: {error}")
        return {}
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    for taken, shards in zip(texts.values(), splits, strict=True):
        remaining = config.max_chars
        for document in iter_documents(shards):
            taken.append(document[:remaining])
            if (remaining := remaining - len(document)) <= 0:
                break
    return texts
