"""Turn any stream of documents into a directory of shuffled shards, once.

Two passes bound the memory, whatever the size: documents are spilled into buckets, and each bucket
is shuffled by itself and written as shards. Documents come in groups that stay together in train or
in validation, such as a module's source and its documentation, which repeat each other.

`corpus.json` next to the shards holds the recipe: the sources and the options.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import pyarrow as pa

from archerchat.config import Config, Limit, PositiveInt, Seed, compare_configs
from archerchat.data.shards import write_shards
from archerchat.errors import DataError, UsageError
from archerchat.files import (
    UNREADABLE,
    current,
    explained_writes,
    new_directory,
    remove_leftovers,
    write_json,
)
from archerchat.tokenizer.bpe import replace_surrogates

MANIFEST = "corpus.json"
FORMAT = 1
MAX_VAL_DOCUMENTS = 8192
BUCKET_BYTES = 64 << 20
MAX_BUCKETS = 256
MAX_NAMED = 5
"""Number of differing source files that an error names."""

Group = Sequence[str]
"""Documents that go to train together or to validation together."""


@dataclass(frozen=True)
class CorpusOptions(Config):
    """Options for shards."""

    val_fraction: Annotated[float, Limit(0, 0.99, exclusive=True)] = 0.05
    """Share of the documents for the validation shard, at most 8192 documents. If files or folders
    are named train and validation (or test), up to 8192 of the latter are taken instead."""
    val_documents: PositiveInt | None = None
    """Number of documents in the validation shard, instead of a share."""
    documents_per_row_group: PositiveInt | None = None
    """Documents per row group, the unit of reading. Defaults to 256, or less so that 8 ranks can
    share a split."""

    documents_per_shard: PositiveInt = 8192
    """Documents per train shard."""
    seed: Seed = 0
    """Seed for the shuffle and the train/validation split."""


def build_corpus(
    groups: Iterable[Group],
    directory: Path,
    recipe: Mapping[str, Any],
    options: CorpusOptions,
    *,
    held_out: Iterable[Group] = (),
    input_bytes: int = 0,
    force: bool = False,
) -> bool:
    """Write the documents of `groups`, shuffled, as the shards of `directory`, atomically.

    Returns False, and reads nothing, if `directory` already has this recipe and these options.
    Documents without a visible character are left out.

    Args:
        recipe: a JSON value that changes whenever `groups` or `held_out` would.
        held_out: documents for the validation shard, if they are not drawn from `groups`.
        input_bytes: approximate size of the text; decides the number of buckets.
        force: replace an earlier corpus, whatever its recipe. Runs that read it cannot be resumed.

    Raises:
        UsageError: `directory` holds something else, or, without `force`, another recipe's corpus.
        DataError: there are not two groups, or the disk is full.
    """
    remove_leftovers(directory.parent)
    manifest = None if force else _load_manifest(directory)
    if manifest is not None:
        saved = manifest["recipe"] | manifest["options"]
        if differences := _list_differences(saved, {**recipe, **asdict(options)}):
            raise UsageError(
                f"{directory} was built from other files or with other settings: "
                f"{'; '.join(differences)}. Give another --name to keep both, or replace it with "
                "--force (runs that read it can then not be resumed)"
            )
        if _is_whole(directory, manifest):
            return False
    if directory.exists() and any(directory.iterdir()) and not (directory / MANIFEST).exists():
        raise UsageError(
            f"{directory} holds data that was not built here and would be replaced: give another "
            f"--name, or remove it"
        )
    with explained_writes(directory), new_directory(directory) as temporary:
        shards = _write_corpus(groups, held_out, temporary, options, input_bytes)
        manifest = {"format": FORMAT, "recipe": recipe, "options": asdict(options)}
        sizes = {shard.name: shard.stat().st_size for shard in shards}
        write_json(temporary / MANIFEST, manifest | {"shards": sizes})
    return True


def find_recipe(directory: Path) -> dict[str, Any] | None:
    """Return the recipe of the corpus in `directory`; None if there is no complete one."""
    manifest = _load_manifest(directory)
    return manifest["recipe"] if manifest and _is_whole(directory, manifest) else None


def _load_manifest(directory: Path) -> dict[str, Any] | None:
    """Read the manifest; None if it is missing or damaged."""
    try:
        manifest: dict[str, Any] = json.loads((current(directory) / MANIFEST).read_bytes())
        parts = [manifest[name] for name in ("recipe", "options", "shards")]
        if manifest["format"] != FORMAT or not all(isinstance(part, dict) for part in parts):
            return None
        _facts_by_file(manifest["recipe"])
    except (*UNREADABLE, KeyError, TypeError):
        return None
    return manifest


def _is_whole(directory: Path, manifest: Mapping[str, Any]) -> bool:
    files = {current(directory) / name: size for name, size in manifest["shards"].items()}
    return all(file.exists() and file.stat().st_size == size for file, size in files.items())


def _list_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the source files that differ, by name, then the other settings."""
    before, after = _facts_by_file(saved), _facts_by_file(now)
    changed = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    lines = []
    for change, names in (
        ("added", after.keys() - before.keys()),
        ("removed", before.keys() - after.keys()),
        ("changed", changed),
    ):
        if names:
            named = [*sorted(names)[:MAX_NAMED], *(["..."] if len(names) > MAX_NAMED else [])]
            lines.append(f"source files {change} ({len(names):,}): {', '.join(named)}")
    settings = ({k: v for k, v in each.items() if k != "files"} for each in (saved, now))
    return lines + compare_configs(*settings)


def _facts_by_file(recipe: Mapping[str, Any]) -> dict[str, list[Any]]:
    single = Path(recipe.get("folder", "")).name  # whose own recipe calls it "."
    return {single if name == "." else str(name): facts for name, *facts in recipe.get("files", [])}


def _write_corpus(
    groups: Iterable[Group],
    held_out: Iterable[Group],
    directory: Path,
    options: CorpusOptions,
    input_bytes: int,
) -> list[Path]:
    generator = random.Random(options.seed)
    validation_texts: list[str] = []

    def iter_train() -> Iterator[str]:
        """Yield the train documents, each bucket shuffled; collect those for validation."""
        for path in buckets:
            with io.TextIOWrapper(pa.input_stream(path, compression="zstd"), "utf-8") as lines:
                documents = list(map(json.loads, lines))
            validation_texts.extend(text for group, text in documents if group in validation)
            texts = [text for group, text in documents if group in train]
            generator.shuffle(texts)
            yield from texts

    def write(documents: Iterable[str], count: int, per_shard: int, first: int) -> list[Path]:
        per_group = options.documents_per_row_group or min(256, max(1, count // 8))
        return write_shards(documents, directory, per_group, per_shard, first)

    with TemporaryDirectory(prefix=".spill-", dir=directory) as scratch:
        num_buckets = min(1 + input_bytes // BUCKET_BYTES, MAX_BUCKETS)
        buckets = [Path(scratch, f"{index}.jsonl.zst") for index in range(num_buckets)]
        sizes, num_train = _spill(groups, held_out, buckets, generator)
        if len(sizes) < 2 or not num_train:
            raise DataError(
                "at least two documents are needed, one of them for validation; found "
                f"{sum(sizes)}: give more text"
            )
        validation = _choose_validation(sizes, num_train, options, generator)
        train = set(range(num_train)) - validation
        num_documents = sum(sizes[group] for group in train)
        shards = write(iter_train(), num_documents, options.documents_per_shard, 0)
    generator.shuffle(validation_texts)
    count = len(validation_texts)
    return shards + write(validation_texts, count, count, len(shards))


def _spill(
    groups: Iterable[Group],
    held_out: Iterable[Group],
    buckets: Sequence[Path],
    generator: random.Random,
) -> tuple[list[int], int]:
    """Put each group into a random bucket.

    Return the sizes of the non-empty groups, and the number of those that are not held out.
    """
    sizes, num_train = list[int](), 0
    with contextlib.ExitStack() as stack:
        streams = [pa.output_stream(path, compression="zstd") for path in buckets]
        files = [stack.enter_context(io.TextIOWrapper(each, "utf-8")) for each in streams]
        marked = chain(zip(groups, repeat(True)), zip(held_out, repeat(False)))
        for group, is_train in marked:
            texts = [replace_surrogates(text) for text in group if text and not text.isspace()]
            if texts:
                lines = (json.dumps([len(sizes), text], ensure_ascii=False) for text in texts)
                generator.choice(files).writelines(f"{line}\n" for line in lines)
                sizes.append(len(texts))
                num_train += is_train
    return sizes, num_train


def _choose_validation(
    sizes: Sequence[int], num_train: int, options: CorpusOptions, generator: random.Random
) -> set[int]:
    """Draw groups for validation until they hold enough documents, leaving one for training.

    Groups after the first `num_train` are held out: if there are any, only they are drawn.
    """
    held_out = range(num_train, len(sizes))
    share = MAX_VAL_DOCUMENTS if held_out else round(options.val_fraction * sum(sizes))
    wanted = options.val_documents or min(share, MAX_VAL_DOCUMENTS)
    chosen, found = set[int](), 0
    candidates = held_out or range(len(sizes))
    for group in generator.sample(candidates, len(held_out) or len(sizes) - 1):
        if chosen and found >= wanted:
            break
        chosen.add(group)
        found += sizes[group]
    return chosen
