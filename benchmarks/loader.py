"""How fast the data loader alone makes batches, against what a training step consumes.

    python benchmarks/loader.py
    python benchmarks/loader.py --data DIRECTORY --tokenizer DIRECTORY

Without `--data` the built-in corpus and, without `--tokenizer`, a tokenizer trained on it are
made in a temporary directory. The rate is that of whole batches, reading, tokenizing and packing
included, while nothing else runs; the last line is one JSON object. Exits with 1 when the slower
packing is below `--required-ratio`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

from rich.console import Console
from rich.table import Table

from archerchat.data.corpus import CorpusOptions, build_corpus
from archerchat.data.packing import Packing
from archerchat.data.shards import iter_documents, list_shards, split_shards
from archerchat.data.stdlib import iter_stdlib, list_stdlib, stdlib_directory
from archerchat.data.text_loader import TextLoader
from archerchat.tokenizer.bpe import Tokenizer, load_ranks, train_tokenizer


@dataclass(frozen=True)
class Measurement:
    packing: str
    first_batch_seconds: float
    tokens_per_second: float


def main() -> int:
    options = parse_options()
    with TemporaryDirectory() as scratch:
        data = options.data or build_stdlib(Path(scratch) / "stdlib")
        train, _ = split_shards(list_shards(data))
        tokenizer = load_tokenizer(options.tokenizer, train)
        measured = [measure(packing, train, tokenizer, options) for packing in get_args(Packing)]
    slowest = min(row.tokens_per_second for row in measured)
    ratio = slowest / options.step_tokens_per_second
    print_table(measured, options)
    settings = {
        "batch_size": options.batch_size,
        "sequence_length": options.sequence_length,
        "vocab_size": tokenizer.vocab_size,
        "step_tokens_per_second": options.step_tokens_per_second,
    }
    figures = {
        "tokens_per_second": slowest,
        "ratio_to_step": ratio,
        "packings": {row.packing: asdict(row) for row in measured},
        "settings": settings,
    }
    print(json.dumps(figures))
    return 0 if ratio >= options.required_ratio else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the data loader alone.")
    parser.add_argument("--data", type=Path, help="directory of shards")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer directory, ours or the oracle's")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to measure each")
    parser.add_argument(
        "--step-tokens-per-second",
        type=float,
        default=21_500.0,
        help="what the training step consumes",
    )
    parser.add_argument("--required-ratio", type=float, default=10.0)
    return parser.parse_args()


def build_stdlib(directory: Path) -> Path:
    root = stdlib_directory()
    build_corpus(iter_stdlib(root, list_stdlib(root)), directory, {}, CorpusOptions())
    return directory


def load_tokenizer(directory: Path | None, train: list[Path]) -> Tokenizer:
    if directory is None:
        return train_tokenizer(iter_documents(train), 4096, max_chars=5_000_000)
    reference_ranks = directory / "mergeable_ranks.tiktoken"
    if reference_ranks.exists():
        pattern = json.loads((directory / "tokenizer.json").read_text())["pattern"]
        return Tokenizer(load_ranks(reference_ranks), pattern=pattern)
    return Tokenizer.load(directory)


def measure(
    packing: Packing, train: list[Path], tokenizer: Tokenizer, options: argparse.Namespace
) -> Measurement:
    with TextLoader(
        train,
        tokenizer,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        packing=packing,
    ) as loader:
        began = time.perf_counter()
        next(loader)
        first = time.perf_counter()
        tokens = 0
        for batch in loader:
            tokens += batch.inputs.size
            elapsed = time.perf_counter() - first
            if elapsed >= options.seconds:
                break
    return Measurement(packing, first - began, tokens / elapsed)


def print_table(measured: list[Measurement], options: argparse.Namespace) -> None:
    table = Table(title="Loader alone", title_justify="left")
    for column in ("packing", "first batch, s", "tokens/s", "times the step's rate"):
        table.add_column(column, justify="left" if column == "packing" else "right")
    for row in measured:
        table.add_row(
            row.packing,
            f"{row.first_batch_seconds:.2f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.tokens_per_second / options.step_tokens_per_second:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
