"""`archerchat eval base`: what a base model is worth, in bits per byte and in samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from archerchat.artifacts import Home, write_json
from archerchat.commands.sample import SampleConfig, print_samples
from archerchat.data.loader import TokenLoader
from archerchat.data.shards import data_directory, list_shards, split_shards
from archerchat.errors import UsageError
from archerchat.evals.bits_per_byte import evaluate_bits_per_byte
from archerchat.inference.loading import LoadedModel, load_model
from archerchat.model.loss import token_losses
from archerchat.runtime import Runtime, build_runtime, prepare_process

EVALUATIONS = ("bpb", "sample")


@dataclass(frozen=True)
class EvalBaseConfig:
    """Evaluate a base model."""

    model_tag: str | None = None
    """The model's name; by default the one that was saved last."""
    step: int | None = None
    """Which of its checkpoints; by default the latest."""
    eval: str = "bpb,sample"
    """What to do, separated by commas: bpb (bits per byte), sample."""
    data: str | None = None
    """Data to measure bits per byte on; by default what the model was trained on."""
    split_tokens: int = 524_288
    """Tokens of each split to measure it on."""
    device_batch_size: int = 32
    """Rows in a batch."""
    json: Path | None = None
    """Also write the figures to this file."""
    device: Literal["cuda", "mps", "cpu"] | None = None
    """Where to run; by default the best there is."""
    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """What to compute in; by default what the device is good at."""


def evaluate(config: EvalBaseConfig, home: Home) -> None:
    """Run the evaluations that are asked for and print their results.

    Raises:
        UsageError: there is no such model or evaluation, or a number makes no sense.
        DataError: the data is missing or broken.
        CheckpointError, TokenizerError: what is there is damaged.
    """
    asked = [name.strip() for name in config.eval.split(",")]
    if unknown := [name for name in asked if name not in EVALUATIONS]:
        raise UsageError(
            f"--eval {config.eval}: {unknown[0]!r} is not one of {', '.join(EVALUATIONS)}"
        )
    for name in ("split_tokens", "device_batch_size"):
        if (value := getattr(config, name)) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    runtime = build_runtime(config.device, config.dtype)
    prepare_process(runtime)
    loaded = load_model(home, runtime, "base", config.model_tag, config.step)
    console.print(f"{loaded.path}", style="dim")
    results: dict[str, Any] = {"checkpoint": str(loaded.path), "step": loaded.step}
    if "bpb" in asked:
        results["bits_per_byte"] = _measure_splits(config, home, loaded, runtime, console)
    if "sample" in asked:
        print_samples(loaded, SampleConfig(), console)
    if config.json is not None:
        write_json(config.json, results)


def _measure_splits(
    config: EvalBaseConfig, home: Home, loaded: LoadedModel, runtime: Runtime, console: Console
) -> dict[str, float]:
    trained = loaded.meta.get("config") or {}
    data = config.data or trained.get("data")
    if data is None:
        raise UsageError(f"{loaded.path} does not say what it was trained on: give --data")
    train, val = split_shards(list_shards(data_directory(data, home)))
    model, tokenizer = loaded.model, loaded.tokenizer
    length = model.config.sequence_length
    steps = max(1, config.split_tokens // (config.device_batch_size * length))
    token_bytes = torch.from_numpy(tokenizer.token_bytes).to(runtime.device)
    table = Table(title=f"Bits per byte on {data}", title_justify="left")
    for column in ("split", "bits per byte", "tokens", "tokens/s"):
        table.add_column(column, justify="left" if column == "split" else "right")
    results = {}
    for split, shards in (("train", train), ("val", val)):
        with TokenLoader(
            shards,
            tokenizer,
            batch_size=config.device_batch_size,
            sequence_length=length,
            packing=trained.get("packing", "best-fit"),
        ) as loader:
            batches = _iter_batches(loader, runtime, steps, f"{split} bits per byte", console)
            started = time.perf_counter()
            results[split] = evaluate_bits_per_byte(_losses_of(loaded), batches, token_bytes)
            tokens = steps * config.device_batch_size * length
            rate = tokens / (time.perf_counter() - started)
        table.add_row(split, f"{results[split]:.4f}", f"{tokens:,}", f"{rate:,.0f}")
    console.print(table)
    return results


def _losses_of(loaded: LoadedModel) -> Callable[[Tensor, Tensor], Tensor]:
    model = loaded.model

    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = model.hidden(inputs)
        return token_losses(hidden, model.unembedding.weight, targets, model.config.vocab_size)

    return losses


def _iter_batches(
    loader: TokenLoader, runtime: Runtime, steps: int, title: str, console: Console
) -> Iterator[tuple[Tensor, Tensor]]:
    quiet = not console.is_terminal
    for _ in track(range(steps), title, console=console, transient=True, disable=quiet):
        batch = next(loader)
        inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
        yield inputs.to(runtime.device), targets.to(runtime.device)
