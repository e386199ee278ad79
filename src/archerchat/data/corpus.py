"""Turn any stream of documents into a directory of shuffled shards, once.

Two passes keep memory bounded whatever the size: documents are spilled into buckets, each to be
shuffled alone, then written as shards. Documents come in groups that must not be torn between
train and validation, such as a module's source and its documentation, which repeat each other.

`corpus.json` beside the shards holds the recipe: what went in and with which options. While the
recipe is the same, building again does nothing; a corpus of another recipe is replaced only on
demand, because runs that read it could not be resumed.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from archerchat.data.shards import TEXT_COLUMN, write_shards
from archerchat.errors import DataError, UsageError
from archerchat.files import current, explained_writes, new_directory, remove_leftovers, write_json
from archerchat.tokenizer.bpe import replace_surrogates

MANIFEST = "corpus.json"
FORMAT = 1
MAX_VAL_DOCUMENTS = 8192
BUCKET_BYTES = 64 << 20
MAX_BUCKETS = 256
SPILL_DOCUMENTS = 1024
_SPILL_SCHEMA = pa.schema([("group", pa.int64()), (TEXT_COLUMN, pa.string())])

Group = Sequence[str]
"""Documents that go to train together or to validation together."""


@dataclass(frozen=True)
class CorpusOptions:
    """Say how documents become shards."""

    val_fraction: float = 0.05
    """share of the documents for validation, at most 8,192 of them"""
    val_documents: int | None = None
    """how many documents for validation, instead of a share"""
    documents_per_row_group: int | None = None
    """None: 256, or fewer so that a split has 8 row groups to share among ranks"""
    documents_per_shard: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise UsageError(f"val_fraction is {self.val_fraction}: it must be between 0 and 1")
        for name in ("val_documents", "documents_per_row_group", "documents_per_shard"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} is {value}: it must be at least 1")


def build_corpus(
    groups: Iterable[Group],
    directory: Path,
    recipe: Mapping[str, Any],
    options: CorpusOptions,
    *,
    input_bytes: int = 0,
    force: bool = False,
) -> bool:
    """Write the documents of `groups`, shuffled, as the shards of `directory`.

    Returns False, without touching `groups`, if `directory` holds what this recipe and these
    options make. Documents without a visible character are left out. The directory appears, or
    is replaced, at once and whole.

    Args:
        recipe: a JSON value that changes whenever `groups` would.
        input_bytes: about how much text there is; decides how much is shuffled in memory.
        force: replace what was built here before, whatever its recipe.

    Raises:
        UsageError: `directory` holds something that was not built here, or, without `force`, was
            built by another recipe.
        DataError: there are not two groups, or the disk is full.
    """
    remove_leftovers(directory.parent)
    made_from = json.loads(json.dumps({"recipe": recipe, "options": asdict(options)}))
    if not force and (manifest := _load_manifest(directory)) is not None:
        differences = _differences(manifest["recipe"], made_from["recipe"])
        differences += _differences(manifest["options"], made_from["options"])
        if differences:
            raise UsageError(
                f"{directory} was built otherwise: {'; '.join(differences)}. Give another --name, "
                f"or replace it with --force (runs that read it can then not be resumed)"
            )
        if _is_whole(directory, manifest):
            return False
    if directory.exists() and any(directory.iterdir()) and not (directory / MANIFEST).exists():
        raise UsageError(
            f"{directory} holds data that was not built here and would be replaced: give another "
            f"--name, or remove it"
        )
    with explained_writes(directory), new_directory(directory) as temporary:
        with TemporaryDirectory(prefix=".spill-", dir=temporary) as scratch:
            shards = _write_corpus(groups, temporary, Path(scratch), options, input_bytes)
        sizes = {shard.name: shard.stat().st_size for shard in shards}
        write_json(temporary / MANIFEST, {"format": FORMAT, **made_from, "shards": sizes})
    return True


def find_recipe(directory: Path) -> dict[str, Any] | None:
    """Return what went into the corpus in `directory`; None where no whole one is."""
    manifest = _load_manifest(directory)
    return manifest["recipe"] if manifest and _is_whole(directory, manifest) else None


def _load_manifest(directory: Path) -> dict[str, Any] | None:
    """Read what `build_corpus` wrote; None where it is missing or damaged."""
    try:
        manifest = json.loads((current(directory) / MANIFEST).read_bytes())
        parts = [manifest[name] for name in ("recipe", "options", "shards")]
        usable = manifest["format"] == FORMAT and all(isinstance(part, dict) for part in parts)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if usable else None


def _is_whole(directory: Path, manifest: Mapping[str, Any]) -> bool:
    try:
        return all(
            (current(directory) / name).stat().st_size == size
            for name, size in manifest["shards"].items()
        )
    except OSError:
        return False


def _differences(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Describe in words each entry of a recipe, or option, that is another now."""
    found = []
    for key in dict.fromkeys([*saved, *asked]):
        before, now = saved.get(key), asked.get(key)
        if key == "files":  # [name, size, ...] each
            files = [{name: rest for name, *rest in listed or ()} for listed in (before, now)]
            names = sorted(n for n in {*files[0], *files[1]} if files[0].get(n) != files[1].get(n))
            if names:
                found.append(f"files differ ({len(names)}, the first is {names[0]})")
        elif before != now:
            found.append(f"{key} was {before} and is {now}")
    return found


def _write_corpus(
    groups: Iterable[Group],
    directory: Path,
    scratch: Path,
    options: CorpusOptions,
    input_bytes: int,
) -> list[Path]:
    generator = random.Random(options.seed)
    num_buckets = min(1 + input_bytes // BUCKET_BYTES, MAX_BUCKETS)
    buckets = [scratch / f"{index}.parquet" for index in range(num_buckets)]
    sizes = _spill(groups, buckets, generator)
    if len(sizes) < 2:
        raise DataError(
            f"{sum(sizes)} documents are too few to train on some and validate on others: "
            f"give more text"
        )
    validation = _choose_validation(sizes, options, generator)
    held_out: list[str] = []
    num_validation = sum(sizes[group] for group in validation)
    train = _iter_train(buckets, validation, held_out, generator)
    shards = write_shards(
        train,
        directory,
        documents_per_row_group=_row_group_size(sum(sizes) - num_validation, options),
        documents_per_shard=options.documents_per_shard,
    )
    generator.shuffle(held_out)
    return shards + write_shards(
        held_out,
        directory,
        documents_per_row_group=_row_group_size(num_validation, options),
        documents_per_shard=num_validation,
        first_index=len(shards),
    )


def _row_group_size(num_documents: int, options: CorpusOptions) -> int:
    default = min(256, max(1, num_documents // 8))
    return options.documents_per_row_group or default


def _spill(groups: Iterable[Group], buckets: Sequence[Path], generator: random.Random) -> list[int]:
    """Throw each group into one of the buckets; return the sizes of the groups, none empty."""
    sizes: list[int] = []
    pending: list[tuple[list[int], list[str]]] = [([], []) for _ in buckets]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(pq.ParquetWriter(path, _SPILL_SCHEMA)) for path in buckets]

        def flush(index: int) -> None:
            columns = dict(zip(_SPILL_SCHEMA.names, pending[index], strict=True))
            writers[index].write_table(pa.table(columns, _SPILL_SCHEMA))
            pending[index] = ([], [])

        for group in groups:
            texts = [replace_surrogates(text) for text in group if text and not text.isspace()]
            if not texts:
                continue
            index = generator.randrange(len(buckets))
            pending[index][0].extend([len(sizes)] * len(texts))
            pending[index][1].extend(texts)
            sizes.append(len(texts))
            if len(pending[index][0]) >= SPILL_DOCUMENTS:
                flush(index)
        for index in range(len(buckets)):
            flush(index)
    return sizes


def _choose_validation(
    sizes: Sequence[int], options: CorpusOptions, generator: random.Random
) -> set[int]:
    """Draw groups until they hold enough documents; at least one is left for training."""
    share = min(round(options.val_fraction * sum(sizes)), MAX_VAL_DOCUMENTS)
    wanted = share if options.val_documents is None else options.val_documents
    chosen: set[int] = set()
    found = 0
    for group in generator.sample(range(len(sizes)), len(sizes) - 1):
        if chosen and found >= wanted:
            break
        chosen.add(group)
        found += sizes[group]
    return chosen


def _iter_train(
    buckets: Sequence[Path], validation: set[int], held_out: list[str], generator: random.Random
) -> Iterator[str]:
    """Yield the train documents, each bucket shuffled; put the others in `held_out`."""
    for path in buckets:
        table = pq.read_table(path)
        train: list[str] = []
        for group, text in zip(*(column.to_pylist() for column in table.columns), strict=True):
            (held_out if group in validation else train).append(text)
        generator.shuffle(train)
        yield from train
