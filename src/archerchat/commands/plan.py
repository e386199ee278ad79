"""`archerchat plan --depth N [--gpu NAME]`: say what a depth will take, before it is trained."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from archerchat.home import Home
from archerchat.planning.memory import RESERVED_SHARE
from archerchat.planning.plan import Plan, PlanConfig, build_plan

Row = tuple[str, str, str]
"""Quantity, value, note."""


def plan(config: PlanConfig, home: Home) -> None:
    """Print what the run that `config` describes will take.

    Raises:
        UsageError: the run is impossible, the card is unknown, or a number makes no sense.
    """
    result = build_plan(config, home.cache_dir)
    if config.json:
        print(json.dumps(plan_as_json(result), allow_nan=False))
        return
    console = Console()
    for title, rows in (
        ("Model", _model_rows(result)),
        ("Run", _run_rows(result)),
        ("Schedule", _schedule_rows(result)),
        ("Data", _data_rows(result)),
        ("Memory of one card (estimate)", _memory_rows(result)),
        ("Time and cost", _time_rows(result, config)),
    ):
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
        table.add_column(style="cyan", min_width=20)
        table.add_column(justify="right", min_width=14)
        table.add_column(style="dim", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Return every number of the plan, derived ones included, as JSON's types."""
    content = dataclasses.asdict(plan)
    hp, estimate = plan.hyperparameters, plan.memory.estimate
    content["hyperparameters"].update(
        total_tokens=hp.total_tokens,
        total_flops=hp.total_flops,
        head_dim=hp.model.head_dim,
        windows=hp.model.windows,
        padded_vocab_size=hp.model.padded_vocab_size,
    )
    content["hyperparameters"]["parameters"].update(
        total=hp.parameters.total, scaling=hp.parameters.scaling
    )
    content["memory"]["estimate"]["fixed"] = estimate.fixed
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
        ("batch", f"{hp.total_batch_tokens:,}", "tokens in one step"),
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
    epochs = f"; {data.epochs:.1f} epochs, the source has no more" if data.epochs > 1 else ""
    return [
        (
            "shards to download",
            f"{data.train_shards} + 1",
            f"train and validation, about {_gigabytes(data.download_bytes)}{epochs}",
        ),
        (
            "tokens per shard",
            _short(data.tokens_per_shard),
            "after packing; --tokens-per-shard sets it",
        ),
    ]


def _memory_rows(plan: Plan) -> list[Row]:
    memory, hp = plan.memory, plan.hyperparameters
    estimate = memory.estimate
    size = memory.device_batch_size
    batch: Row = (
        "device batch size",
        str(size) if size else "does not fit",
        f"{memory.grad_accum_steps} micro-batches a step; the largest power of two that fits"
        if size
        else "not even one row: a smaller --depth or --max-seq-len, or a larger card",
    )
    return [
        ("weights", _gib(estimate.weights), "float32 masters; tables in the compute dtype"),
        ("gradients", _gib(estimate.gradients), ""),
        ("optimizer state", _gib(estimate.optimizer_state), f"shared by {plan.num_gpus} card(s)"),
        ("weight copies", _gib(estimate.weight_casts), f"in {plan.machine.compute_dtype}"),
        ("workspace", _gib(estimate.workspace), "loss chunks, Muon's products"),
        (
            "activations",
            _gib(estimate.activations_per_row),
            f"each row of {hp.model.sequence_length} tokens; fused attention, no recomputation",
        ),
        batch,
        (
            "peak",
            _gib(memory.peak_bytes),
            f"of {_gib(memory.device_bytes)}; {RESERVED_SHARE:.0%} is left free",
        ),
        (
            "KV cache",
            f"{memory.kv_bytes_per_token / 1024:.1f} KiB",
            f"a generated token; {memory.kv_cache_bytes / 2**20:.1f} MiB a full row, where "
            "windowed layers keep only their window",
        ),
    ]


def _time_rows(plan: Plan, config: PlanConfig) -> list[Row]:
    machine, time = plan.machine, plan.time
    rows: list[Row] = [
        ("device", f"{plan.num_gpus} x {machine.name}", machine.compute_dtype),
        ("peak", f"{machine.flops_per_second / 1e12:.4g} TFLOP/s", machine.flops_source),
        (
            "MFU",
            f"{time.mfu:.0%}",
            "assumed for this kind of device; --mfu sets it" if time.mfu_is_assumed else "given",
        ),
        ("tokens per second", f"{time.tokens_per_second:,.0f}", ""),
        ("training", _duration(time.hours), "evaluation and checkpoints come on top"),
    ]
    if time.rent is not None:
        origin = "assumed; --price-per-hour sets it" if time.price_is_assumed else "given"
        note = f"${time.price_per_hour:.2f} a card and hour, {origin}"
        rows.append(("rent", f"${time.rent:,.2f}", note))
    if time.kwh is not None and machine.gpu is not None:
        note = f"at {machine.gpu.board_watts} W a card; the rest of the machine not counted"
        rows.append(("energy", f"{time.kwh:.1f} kWh", note))
    if time.energy_cost is not None:
        note = f"${config.price_per_kwh:.2f} a kWh, assumed unless --price-per-kwh is given"
        rows.append(("electricity", f"${time.energy_cost:,.2f}", note))
    if time.rent is None and time.energy_cost is None:
        rows.append(("cost", "unknown", "--price-per-hour sets it"))
    return rows


def _short(count: int) -> str:
    """Return 286261730 as 286.3M, and what is below 10,000 in full."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= max(factor, 1e4):
            return f"{count / factor:.1f}{letter}"
    return str(count)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.1f} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"
