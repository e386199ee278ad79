"""`archerchat eval base`: measure a base model by CORE, by bits per byte and by samples.

archerchat eval base --eval core,bpb,sample --max-per-task 500
archerchat eval base --eval bpb --text war_and_peace.txt
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from archerchat.commands.eval_core import evaluate_core
from archerchat.commands.sample import SampleConfig, print_samples
from archerchat.config import DeviceConfig, PositiveInt
from archerchat.console import build_console
from archerchat.data.shards import data_directory, list_shards, split_shards
from archerchat.data.text_loader import TextLoader
from archerchat.errors import UsageError
from archerchat.evals.bits_per_byte import evaluate_bits_per_byte, iter_text_batches
from archerchat.evals.core.evaluate import CoreOptions
from archerchat.files import write_json
from archerchat.home import Home
from archerchat.inference.loading import LoadedModel, load_model
from archerchat.model.loss import token_losses
from archerchat.runtime import Runtime, build_runtime, prepare_process

EVALUATIONS = ("core", "bpb", "sample")
SPLITS = ("train", "val")


@dataclass(frozen=True)
class EvalBaseConfig(DeviceConfig):
    """Evaluate a base model."""

    model_tag: str | None = None
    """Model to evaluate. Defaults to the one saved last."""
    step: int | None = None
    """Checkpoint to evaluate. Defaults to the latest."""
    eval: str = "bpb,sample"
    """Evaluations to run, separated by commas: core, bpb (bits per byte), sample."""
    bundle: str | None = None
    """CORE bundle: a folder, or the address of an archive. Defaults to the reference's, which is
    downloaded once. `offline` stands for generated tasks, which are not CORE."""
    core: CoreOptions = field(default_factory=CoreOptions)
    data: str | None = None
    """Data for bits per byte. Defaults to what the model was trained on."""
    split: str | None = None
    """Splits for bits per byte, separated by commas: train, val. Defaults to both, or to none with
    --text."""
    split_tokens: PositiveInt = 524_288
    """Tokens per split for bits per byte."""
    text: Path | None = None
    """Measure bits per byte on all of this text file."""
    device_batch_size: PositiveInt = 32
    """Rows per batch. Halve it if you run out of memory."""
    json: Path | None = None
    """Also write the figures to this file."""


def evaluate(config: EvalBaseConfig, home: Home) -> None:
    """Run the evaluations that are asked for and print their results.

    Raises:
        UsageError: there is no such model, evaluation, split, bundle or text.
        DataError: the data is missing or broken.
        CheckpointError, TokenizerError: the checkpoint is damaged.
    """
    asked = _names(config.eval, "--eval", EVALUATIONS)
    default = "" if config.text else ",".join(SPLITS)
    splits = _names(config.split or default, "--split", SPLITS) if config.split or default else []
    if config.text and not config.text.is_file():
        raise UsageError(f"--text {config.text}: there is no such file")
    runtime = build_runtime(config.device, config.dtype)
    prepare_process(runtime)
    console = build_console(quiet=not runtime.is_master)
    loaded = load_model(home, runtime, "base", config.model_tag, config.step)
    console.print(f"{loaded.path}", style="dim")
    results: dict[str, Any] = {"checkpoint": str(loaded.path), "step": loaded.step}
    if "core" in asked:
        core = evaluate_core(loaded, runtime, home, console, config.bundle, config.core)
        results["core"] = core.to_json()
    if not runtime.is_master:
        return
    if "bpb" in asked:
        results["bits_per_byte"] = _measure_splits(config, splits, home, loaded, runtime, console)
    if "sample" in asked:
        print_samples(loaded, SampleConfig(), console)
    if config.json is not None:
        write_json(config.json, results)


def _names(given: str, flag: str, known: tuple[str, ...]) -> list[str]:
    """Return the names in a list separated by commas."""
    names = [name.strip() for name in given.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"{flag} {given}: {unknown[0]!r} is not one of {', '.join(known)}")
    return names


def _measure_splits(
    config: EvalBaseConfig,
    splits: list[str],
    home: Home,
    loaded: LoadedModel,
    runtime: Runtime,
    console: Console,
) -> dict[str, float]:
    """Measure bits per byte on splits and on the text file, and print them as one table."""
    trained = loaded.meta.get("config") or {}
    length, rows = loaded.model.config.sequence_length, config.device_batch_size
    table = Table(title="Bits per byte", title_justify="left")
    for column in ("text", "bits per byte", "tokens", "tokens/s"):
        table.add_column(column, justify="left" if column == "text" else "right")
    results: dict[str, float] = {}
    if splits:
        data = config.data or trained.get("data")
        if data is None:
            raise UsageError(f"{loaded.path} does not say what it was trained on: give --data")
        table.title = f"Bits per byte on {data}"
        train, val = split_shards(list_shards(data_directory(data, home)))
        steps = max(1, config.split_tokens // (rows * length))
        for split in splits:
            with TextLoader(
                train if split == "train" else val,
                loaded.tokenizer,
                batch_size=rows,
                sequence_length=length,
                packing=trained.get("packing", "best-fit"),
            ) as loader:
                batches = _iter_batches(loader, runtime, steps, f"{split} bits per byte", console)
                results[split] = _measure(split, batches, loaded, table)
    if config.text:
        batches = iter_text_batches(config.text, loaded.tokenizer, rows, length, runtime.device)
        results[str(config.text)] = _measure(config.text.name, batches, loaded, table)
    console.print(table)
    return results


def _iter_batches(
    loader: TextLoader, runtime: Runtime, steps: int, title: str, console: Console
) -> Iterator[tuple[Tensor, Tensor]]:
    quiet = not console.is_terminal
    for _ in track(range(steps), title, console=console, transient=True, disable=quiet):
        batch = next(loader)
        inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
        yield inputs.to(runtime.device), targets.to(runtime.device)


def _measure(
    name: str, batches: Iterator[tuple[Tensor, Tensor]], loaded: LoadedModel, table: Table
) -> float:
    """Measure bits per byte on batches, and add a line to the table."""
    model, started, tokens = loaded.model, time.perf_counter(), 0

    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal tokens
        tokens += int((targets >= 0).sum())
        hidden = model.hidden(inputs)
        return token_losses(hidden, model.unembedding.weight, targets, model.config.vocab_size)

    token_bytes = torch.from_numpy(loaded.tokenizer.token_bytes).to(model.device)
    bits = evaluate_bits_per_byte(losses, batches, token_bytes)
    rate = tokens / (time.perf_counter() - started)
    table.add_row(name, f"{bits:.4f}", f"{tokens:,}", f"{rate:,.0f}")
    return bits
