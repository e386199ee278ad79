"""`archerchat plan --depth N [--gpu NAME]`: what training takes, before it is started."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from archerchat.console import bytes_text, duration_text
from archerchat.data.hub import SOURCES
from archerchat.data.shards import data_directory, list_shards, split_shards
from archerchat.data.text_sample import measure_text
from archerchat.home import Home
from archerchat.planning.memory import RESERVED_SHARE
from archerchat.planning.plan import Plan, PlanConfig, build_plan
from archerchat.tokenizer.bpe import Tokenizer, find_tokenizer

Row = tuple[str, str, str]
"""Quantity, value, note."""


def plan(config: PlanConfig, home: Home) -> None:
    """Print what the run that `config` describes takes.

    Raises:
        UsageError: the run is impossible, or the card, the data or the tokenizer is unknown.
        DataError: the data cannot be read.
    """
    text = None
    if config.data is not None:
        shards, _ = split_shards(list_shards(data_directory(config.data, home)))
        tokenizer = Tokenizer.load(find_tokenizer(home, config.tokenizer))
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
        text = measure_text(shards, tokenizer, config.dial.max_seq_len + 1)
    result = build_plan(config, home.cache_dir)
    content, data_rows = plan_as_json(result), _data_rows(result)
    if text is not None:
        tokens = result.hyperparameters.total_tokens
        packing = "best-fit" if config.data in SOURCES else text.packing
        content["text"] = dataclasses.asdict(text) | {
            "packing": packing,
            "passes": text.passes(tokens, packing),
        }
        data_rows = [
            ("text", config.data or "", text.describe(tokens, packing)),
            ("packing", packing, f"best-fit would keep {text.kept:.1%} of the text"),
        ]
    if config.json:
        print(json.dumps(content, allow_nan=False))
        return
    console = Console()
    for title, rows in (
        ("Model", _model_rows(result)),
        ("Run", _run_rows(result)),
        ("Schedule", _schedule_rows(result)),
        ("Data", data_rows),
        ("Memory of one card (estimate)", _memory_rows(result)),
        ("Time and cost", _time_rows(result, config.mfu is None)),
    ):
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
        table.add_column(style="cyan", min_width=20)
        table.add_column(justify="right", min_width=14)
        table.add_column(style="dim", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print("[bold]Commands[/bold]")
    for line in _commands(config, result):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _commands(config: PlanConfig, plan: Plan) -> list[str]:
    """Return what to type for this run, from text to a chat model."""
    dial = config.dial
    given = []
    for field in dataclasses.fields(dial):
        flag, value = field.name.replace("_", "-"), getattr(dial, field.name)
        if value is False:
            given.append(f"--no-{flag}")
        elif field.name == "depth" or value != field.default:
            given.append(f"--{flag} {value}")
    if config.activation_checkpointing:
        given.append("--activation-checkpointing")
    if config.optimizer_state != "float32":
        given.append(f"--optimizer-state {config.optimizer_state}")
    if plan.memory.device_batch_size is not None:
        given.append(f"--device-batch-size {plan.memory.device_batch_size}")
    tag = f"--model-tag d{dial.depth}"
    return [
        f"archerchat data download --num-shards {plan.data.train_shards}",
        f"archerchat tokenizer train --vocab-size {config.vocab_size}",
        f"archerchat pretrain {' '.join(given)}",
        f"archerchat eval base {tag}",
        f"archerchat sft {tag}",
        f"archerchat eval chat {tag}",
    ]


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Return every number of the plan, derived ones included, as JSON's types."""
    content = dataclasses.asdict(plan)
    hp, model, counts = plan.hyperparameters, plan.hyperparameters.model, content["hyperparameters"]
    counts |= {name: getattr(hp, name) for name in ("total_tokens", "total_flops")}
    counts |= {n: getattr(model, n) for n in ("head_dim", "windows", "padded_vocab_size")}
    counts["parameters"] |= {n: getattr(hp.parameters, n) for n in ("total", "scaling")}
    content["memory"]["estimate"]["fixed"] = plan.memory.estimate.fixed
    return content


def _model_rows(plan: Plan) -> list[Row]:
    hp = plan.hyperparameters
    model, counts = hp.model, hp.parameters
    long = sum(window == model.sequence_length for window in model.windows)
    windows = f"{long} of them see {model.sequence_length} tokens back"
    if long < model.num_layers:
        windows += f", the others {min(model.windows)}"
    embedded = sum(model.has_value_embedding(i) for i in range(model.num_layers))
    return [
        ("layers", str(model.num_layers), windows),
        ("width", str(model.model_dim), f"{model.num_heads} heads of {model.head_dim}"),
        ("key/value heads", str(model.num_kv_heads), ""),
        ("vocabulary", str(model.vocab_size), f"tables have {model.padded_vocab_size} rows"),
        ("parameters", _short(counts.total), ""),
        ("  block matrices", _short(counts.block_matrices), "Muon"),
        ("  unembedding", _short(counts.unembedding), "AdamW"),
        ("  embedding", _short(counts.embedding), "AdamW"),
        ("  value embeddings", _short(counts.value_embeddings), f"AdamW; {embedded} layers"),
        ("  scalars", _short(counts.scalars), "AdamW"),
        ("scaling parameters", _short(counts.scaling), "block matrices and unembedding"),
    ]


def _run_rows(plan: Plan) -> list[Row]:
    hp = plan.hyperparameters
    rates = hp.learning_rates
    ratio = hp.total_tokens / hp.parameters.scaling
    return [
        ("batch", f"{hp.total_batch_tokens:,}", "tokens per step"),
        ("iterations", f"{hp.num_iterations:,}", ""),
        ("tokens", _short(hp.total_tokens), f"{ratio:.2f} per scaling parameter"),
        ("FLOPs per token", _short(hp.flops_per_token), "forward and backward"),
        ("FLOPs", f"{hp.total_flops:.3g}", ""),
        ("rate: matrices", f"{rates.matrix:.4g}", f"batch scale {hp.batch_lr_scale:.4g}"),
        ("rate: embedding", f"{rates.embedding:.4g}", f"width scale {hp.width_lr_scale:.4g}"),
        ("rate: unembedding", f"{rates.unembedding:.4g}", ""),
        ("rate: scalars", f"{rates.input_lambdas:.4g}", ""),
        ("weight decay", f"{hp.weight_decay:.4g}", "Muon's, at the first step"),
    ]


def _schedule_rows(plan: Plan) -> list[Row]:
    return [
        (
            f"iteration {it:,}",
            f"rate x {rate:.3g}",
            f"Muon momentum {momentum:.3g}, weight decay {decay:.3g}",
        )
        for it, rate, momentum, decay in plan.schedule_points
    ]


def _data_rows(plan: Plan) -> list[Row]:
    data = plan.data
    note = f"training and validation, about {data.download_bytes / 1e9:.1f} GB"
    if data.epochs > 1:
        note += f"; {data.epochs:.1f} epochs, because the source has no more"
    per_shard = _short(data.tokens_per_shard)
    return [
        ("shards to download", f"{data.train_shards} + 1", note),
        ("tokens per shard", per_shard, "after packing; --tokens-per-shard sets it"),
    ]


def _memory_rows(plan: Plan) -> list[Row]:
    memory, estimate = plan.memory, plan.memory.estimate
    size, row_tokens = memory.device_batch_size, plan.hyperparameters.model.sequence_length
    remedy = (
        "not even one row: try --optimizer-state bfloat16, a smaller --depth or --max-seq-len, or "
        "a larger card"
    )
    again = "layers are computed again" if memory.recomputes else "nothing is computed again"
    batch = f"{memory.grad_accum_steps} micro-batches per step; the largest power of two that fits"
    free = f"of {bytes_text(memory.device_bytes)}; {RESERVED_SHARE:.0%} is left free"
    cache = f"{bytes_text(memory.kv_cache_bytes)} per full row, since windowed layers keep less"
    return [
        ("weights", bytes_text(estimate.weights), "float32 masters; tables in the compute dtype"),
        ("gradients", bytes_text(estimate.gradients), ""),
        (
            "optimizer state",
            bytes_text(estimate.optimizer_state),
            f"shared by {plan.num_gpus} card(s)",
        ),
        ("weight copies", bytes_text(estimate.weight_casts), f"in {plan.machine.compute_dtype}"),
        ("workspace", bytes_text(estimate.workspace), "loss chunks, Muon's products"),
        (
            "activations",
            bytes_text(estimate.activations_per_row),
            f"per row of {row_tokens} tokens; fused attention, {again}",
        ),
        ("device batch size", str(size or "does not fit"), batch if size else remedy),
        ("peak", bytes_text(memory.peak_bytes), free),
        ("KV cache", bytes_text(memory.kv_bytes_per_token), f"per generated token; {cache}"),
    ]


def _time_rows(plan: Plan, mfu_is_assumed: bool) -> list[Row]:
    machine, time = plan.machine, plan.time
    mfu_note = "assumed for this kind of device; --mfu sets it" if mfu_is_assumed else "given"
    rows: list[Row] = [
        ("device", f"{plan.num_gpus} x {machine.name}", machine.compute_dtype),
        ("peak", f"{machine.flops_per_second / 1e12:.4g} TFLOP/s", machine.flops_source),
        ("MFU", f"{time.mfu:.0%}", mfu_note),
        ("tokens per second", f"{time.tokens_per_second:,.0f}", ""),
        ("training", _days(time.hours - time.evaluation_hours), ""),
        (
            f"{time.num_evaluations} evaluations",
            _days(time.evaluation_hours),
            "of bits per byte; --eval-every and --eval-tokens set them",
        ),
        ("all of it", _days(time.hours), "CORE, samples and checkpoints are extra"),
        ("cost", "unknown" if time.cost is None else f"${time.cost:,.2f}", time.price_note),
    ]
    if time.kwh is not None and machine.gpu is not None:
        note = f"at {machine.gpu.board_watts} W per card; the rest of the machine is not counted"
        rows.append(("energy", f"{time.kwh:.1f} kWh", note))
    return rows


def _short(count: int) -> str:
    """Return 286261730 as 286.3M, and what is below 10,000 in full."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= max(factor, 1e4):
            return f"{count / factor:.1f}{letter}"
    return str(count)


def _days(hours: float) -> str:
    return duration_text(3600 * hours) if hours < 72 else f"{hours / 24:.1f} days"
