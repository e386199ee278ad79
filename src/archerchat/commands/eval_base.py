"""`archerchat eval base`: measure a base model's CORE and bits per byte, and print samples.

    archerchat eval base --eval core,bpb,sample --max-per-task 500
    archerchat eval base --eval bpb --text war_and_peace.txt

CORE's figures go to `evals/base/<tag>/core_<step>.json` under the home; another bundle or a limit
adds to the name. An interrupted evaluation resumes from the `.partial.json` in the same folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from archerchat.checkpoint import META
from archerchat.commands.chat import SampleConfig, print_samples
from archerchat.config import PositiveInt
from archerchat.console import LiveLine, build_console, build_table, duration_text
from archerchat.data.shards import data_directory, iter_documents, list_shards, split_shards
from archerchat.data.text_loader import TextLoader
from archerchat.distributed import joined_ranks
from archerchat.errors import UsageError
from archerchat.evals.bits_per_byte import evaluate_bits_per_byte, iter_text_batches
from archerchat.evals.core.bundle import find_bundle, load_bundle
from archerchat.evals.core.evaluate import (
    CoreEvaluation,
    CoreOptions,
    CoreResult,
    CoreTaskResult,
    PartialResults,
    describe,
    is_offline,
)
from archerchat.files import sha256_file, write_json
from archerchat.home import Home
from archerchat.inference.loading import LoadedModel, ModelOptions, build_inference_model
from archerchat.model.loss import token_losses
from archerchat.model.transformer import Transformer
from archerchat.planning.memory import CPU_TOKENS
from archerchat.runtime import Runtime, dtype_name

EVALUATIONS = ("core", "bpb", "sample")
SPLITS = ("train", "val")


@dataclass(frozen=True)
class EvalBaseConfig(ModelOptions):
    """Evaluate a base model."""

    eval: str = "bpb,sample"
    """Evaluations to run, separated by commas: core, bpb (bits per byte), sample."""
    bundle: str | None = None
    """CORE bundle: a folder, or the address of an archive. Defaults to the reference's, which is
    downloaded once. `offline` stands for the package's own tasks, which are not CORE."""
    core: CoreOptions = field(default_factory=CoreOptions)
    data: str | None = None
    """Data for bits per byte. Defaults to the model's training data."""
    split: str | None = None
    """Splits for bits per byte, separated by commas: train, val. Defaults to both, or to none with
    --text."""
    split_tokens: PositiveInt = 524_288
    """Tokens per split for bits per byte, within one pass over its text."""
    text: Path | None = None
    """Measure bits per byte on all of this text file."""
    device_batch_size: PositiveInt = 32
    """Rows per batch; a CPU takes at most 8,192 tokens. Halve it if you run out of memory."""
    json: Path | None = None
    """Also write the figures to this file."""


def evaluate(config: EvalBaseConfig, home: Home) -> None:
    """Run the chosen evaluations and print their results."""
    asked = _names(config.eval, "--eval", EVALUATIONS)
    default = [] if config.text else list(SPLITS)
    splits = _names(config.split, "--split", SPLITS) if config.split else default
    if config.bundle and "core" not in asked:
        raise UsageError("--bundle is for CORE: add --eval core, or leave --bundle out")
    if config.text and not config.text.is_file():
        raise UsageError(f"--text {config.text}: there is no such file")
    loaded, runtime = config.load(home, "base")
    console = build_console(quiet=not runtime.is_master)
    results: dict[str, Any] = {"checkpoint": str(loaded.path), "step": loaded.step}
    if "core" in asked:
        results["core"] = _evaluate_core(config, home, loaded, runtime, console).to_json()
    if not runtime.is_master:
        return
    if "bpb" in asked:
        results["bits_per_byte"] = _measure_texts(config, home, splits, loaded, console)
    if "sample" in asked:
        print_samples(loaded, SampleConfig(), console)
    if config.json is not None:
        write_json(config.json, results)


def _names(given: str, flag: str, known: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in given.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"{flag} {given}: {unknown[0]!r} is not one of {', '.join(known)}")
    return names


def _evaluate_core(
    config: EvalBaseConfig, home: Home, loaded: LoadedModel, runtime: Runtime, console: Console
) -> CoreResult:
    """Evaluate CORE, resuming an interrupted call, and write the results on the first rank."""
    model, options = build_inference_model(loaded.model), config.core
    with joined_ranks(runtime) as ranks:
        find = partial(find_bundle, config.bundle, home.cache_dir, notify=console.print)
        bundle = load_bundle(ranks.first_alone(find))
        evaluation = CoreEvaluation(bundle, loaded.tokenizer, options, ranks)
        if not runtime.is_master:
            return evaluation.run(model)
        about: dict[str, Any] = {
            "checkpoint": str(loaded.path),
            "step": loaded.step,
            "checkpoint_sha256": sha256_file(loaded.path / META),
            "tokenizer": loaded.tokenizer.fingerprint,
            "bundle": str(bundle.directory),
            "bundle_sha256": bundle.fingerprint(),
            "dtype": dtype_name(runtime.compute_dtype),
            "device": runtime.device_name,
            "options": asdict(options),
        }
        # Partial evaluations have their own names, so they never replace the whole of CORE.
        offline = is_offline(bundle.tasks)
        name = f"{'offline' if offline else 'core'}_{loaded.step:06d}"
        name += f"_max{options.max_per_task}" if options.max_per_task else ""
        name += f"_length{options.max_length}" if options.max_length else ""
        name += f"_{about['bundle_sha256'][:8]}" if config.bundle and not offline else ""
        path = home.eval_dir("base", loaded.tag) / f"{name}.json"
        kept = PartialResults(path.with_suffix(".partial.json"), about)
        result = _run_core(evaluation, model, kept, console)
    write_json(path, {**about, **result.to_json()})
    kept.remove()
    for note in describe(result):
        console.print(f"note: {note}")
    low, high = result.interval
    console.print(
        f"{'offline tasks (not CORE):' if offline else 'CORE'} {result.core:.4f} (95 % interval "
        f"{low:.4f} to {high:.4f}) in {duration_text(result.seconds)}; {path}"
    )
    return result


def _run_core(
    evaluation: CoreEvaluation, model: Transformer, kept: PartialResults, console: Console
) -> CoreResult:
    """Evaluate with a progress bar on a terminal, or with one line per task elsewhere."""
    if kept.tasks:
        console.print(f"resuming after {', '.join(kept.tasks)}")
    expected = evaluation.estimate(model.config.windows, kept.tasks)
    examples = sum(each.examples for each in expected.values())
    total = sum(each.tokens for each in expected.values())
    console.print(
        f"CORE: {examples:,} examples in {len(expected)} tasks, about {total / 1e6:,.1f} million "
        "tokens to run"
    )
    table = build_table("task", "examples", "accuracy", "centred", "per second", title="CORE")
    shares: dict[str, float] = {}

    def on_progress(label: str, share: float) -> None:
        shares[label] = share
        done = sum(expected[label].tokens * share for label, share in shares.items())
        line.show(f"{label} | about {line.left(done, total)} left in all", done)

    def on_task(result: CoreTaskResult) -> None:
        accuracy, centred = f"{result.accuracy:.4f}", f"{result.centred:.4f}"
        rate = f"{result.examples_per_second:,.1f}"
        table.add_row(result.label, f"{result.examples:,}", accuracy, centred, rate)
        if not console.is_terminal:
            console.print(
                f"{result.label}: accuracy {accuracy}, centred {centred}, {rate} examples/s"
            )

    with LiveLine(console, "CORE", total) as line:
        result = evaluation.run(model, kept, on_task, on_progress)
    console.print(table)
    return result


def _measure_texts(
    config: EvalBaseConfig, home: Home, splits: list[str], loaded: LoadedModel, console: Console
) -> dict[str, float]:
    model, tokenizer, trained = loaded.model, loaded.tokenizer, loaded.meta.get("config") or {}
    rows, length = config.device_batch_size, model.config.sequence_length
    if model.device.type == "cpu":  # more are not faster there, and progress would show later
        rows = min(rows, max(1, CPU_TOKENS // length))
    table = build_table("text", "bits per byte", "tokens", "tokens/s", title="Bits per byte")
    # For each text: its batches, its bytes, and the most tokens to measure.
    texts: dict[str, tuple[Iterator[tuple[Tensor, Tensor]], int, float]] = {}
    if splits:
        data = config.data or trained.get("data")
        if data is None:
            raise UsageError(f"{loaded.path} does not say what it was trained on: give --data")
        table.title = f"Bits per byte on {data}"
        train, val = split_shards(list_shards(data_directory(data, home)))
    sizes = tokenizer.token_bytes
    for name in splits:
        shards = train if name == "train" else val
        num_bytes = _count_bytes(shards, config.split_tokens * int(sizes.max()))
        loader = TextLoader(
            shards,
            tokenizer,
            batch_size=rows,
            sequence_length=length,
            packing=trained.get("packing", "best-fit"),
        )
        steps = max(1, config.split_tokens // (rows * length))
        batches = _iter_once(loader, sizes, num_bytes, steps, model.device)
        texts[name] = batches, num_bytes, steps * rows * length
    if config.text:
        batches = iter_text_batches(config.text, tokenizer, rows, length, model.device)
        texts[str(config.text)] = batches, config.text.stat().st_size, math.inf
    results: dict[str, float] = {}
    for name, text in texts.items():
        started, label = time.perf_counter(), Path(name).name
        results[name], tokens = _measure(text, loaded, console, f"{label} bits per byte")
        rate = tokens / (time.perf_counter() - started)
        table.add_row(label, f"{results[name]:.4f}", f"{tokens:,}", f"{rate:,.0f}")
    console.print(table)
    return results


def _measure(
    text: tuple[Iterator[tuple[Tensor, Tensor]], int, float],
    loaded: LoadedModel,
    console: Console,
    title: str,
) -> tuple[float, int]:
    """Return a text's bits per byte and the number of tokens measured, and show the time left."""
    (batches, num_bytes, most_tokens), model = text, loaded.model
    token_bytes = torch.from_numpy(loaded.tokenizer.token_bytes).to(model.device)
    tokens = seen_bytes = 0

    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal tokens, seen_bytes
        hidden = model.hidden(inputs)
        values = token_losses(hidden, model.unembedding.weight, targets, model.config.vocab_size)
        tokens += int((targets >= 0).sum())
        seen_bytes += int(token_bytes[targets.clamp(min=0)].sum())
        share = max(tokens / most_tokens, seen_bytes / max(1, num_bytes))
        left = line.left(share, 1) if share <= 1 else "?"  # a compressed file holds more
        line.show(f"{title} | {min(1, share):.0%} | about {left} left", min(1, share))
        return values

    with LiveLine(console, title, 1) as line:
        return evaluate_bits_per_byte(losses, batches, token_bytes), tokens


def _count_bytes(shards: Sequence[Path], enough: int) -> int:
    """Count the bytes of the text of `shards`; stop at `enough`."""
    count = 0
    for text in iter_documents(shards):
        count += len(text.encode())
        if count >= enough:
            break
    return count


def _iter_once(
    loader: TextLoader, sizes: NDArray[Any], num_bytes: int, steps: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield at most `steps` batches of inputs and targets (B, T), within one pass over the text.

    The last one is cut before the row whose targets would exceed the text's `num_bytes`.
    """
    left = num_bytes
    with loader:
        for step, batch in enumerate(islice(loader, steps)):
            ends = sizes[batch.targets].sum(axis=1).cumsum()
            rows = max(int(step == 0), int((ends <= left).sum()))
            if rows:
                inputs, targets = torch.from_numpy(batch.stacked[:, :rows]).to(device)
                yield inputs, targets
            if (left := left - int(ends[-1])) <= 0:
                return
