"""Estimate what training a model of some depth takes: data, memory, hours, money.

The dial gives the run's size exactly. The rest is computed from published or measured rates and
from assumptions, each of which is a flag or a constant here with its reason.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from archerchat.config import Config, PositiveFloat, PositiveInt, Share, StateDtypeName
from archerchat.dial import DialConfig, Hyperparameters, build_hyperparameters, grad_accum_steps
from archerchat.errors import UsageError
from archerchat.optim.schedule import MOMENTUM_WARMUP_STEPS, Schedule, build_schedule
from archerchat.planning.gpus import Gpu, Prices, find_gpu, known_gpus
from archerchat.planning.memory import fit_micro_batch, kv_bytes_per_token, kv_cache_bytes
from archerchat.planning.peak_flops import peak_flops
from archerchat.runtime import DTYPES, Runtime, build_runtime, dtype_name, training_dtype

SHARD_BYTES = 100_000_000
"""Compressed size of one of the hub's shards, which holds `CHARACTERS_PER_SHARD`."""
CHARACTERS_PER_SHARD = 250_000_000
CHARACTERS_PER_TOKEN = 4.4
"""Measured: a 32,768-token vocabulary on validation text of 24 MB of English prose and docs."""
KEPT_BY_PACKING = 0.75
"""Share of tokens that best-fit packing keeps at 2,048 tokens: simulated 0.72 to 0.78 for
document lengths like the web's (mean 800 to 1,000 tokens); 0.95 for short, even ones."""
TOKENS_PER_SHARD = int(CHARACTERS_PER_SHARD / CHARACTERS_PER_TOKEN * KEPT_BY_PACKING)
TRAIN_SHARDS = 6542
"""Training shards of climbmix-400b-shuffle (SPEC section 4)."""
VOCAB_SIZE = 32768
EVAL_EVERY, EVAL_TOKENS = 250, 41_943_040
"""Pretraining's defaults: steps between evaluations, and validation tokens of each."""
BYTES_PER_TOKEN = 4  # of validation text, roughly: it only serves to estimate the time
FORWARD_SHARE = 1 / 3
"""Share of a training token's operations that an evaluated token takes."""
MFU_DATA_CENTRE = 0.40
MFU_GEFORCE = 0.65
"""Slower tensor cores are easier to keep busy: SPEC section 11's speeds on the RTX 5060 Ti are 66 %
(d8) and 72 % (d12) of its published rate."""
MFU_CPU = 0.20


@dataclass(frozen=True)
class PlanConfig(Config):
    """Estimate memory, time and cost of training a model of this depth."""

    dial: DialConfig
    """Hyperparameters of the run."""
    data: str | None = None
    """Data on this machine to measure, by its name. Defaults to an estimate for ClimbMix."""
    tokenizer: str = "default"
    """Name of the tokenizer."""
    vocab_size: PositiveInt | None = None
    """Size of the vocabulary. Defaults to the tokenizer's, or 32,768 without one or with --gpu."""
    gpu: str | None = None
    """Card to train on, such as "RTX 5060 Ti" or "H100". Defaults to this machine's device."""
    gpu_memory: PositiveFloat | None = None
    """Memory of one card in GiB. Defaults to the published size."""
    num_gpus: PositiveInt = 1
    """Number of cards, one rank each."""
    activation_checkpointing: bool = False
    """Recompute layers in the backward pass to save memory. Done anyway if not one row fits."""
    optimizer_state: StateDtypeName = "float32"
    """Dtype of the optimizer's moments; bfloat16 needs half the memory."""
    mfu: Share | None = None
    """Share of the peak rate that training reaches. Defaults to an estimate for the device."""
    prices: Prices = field(default_factory=Prices)
    """Prices for the estimated cost."""
    eval_every: PositiveInt | None = EVAL_EVERY
    """Steps between evaluations; `none` for never."""
    eval_tokens: PositiveInt = EVAL_TOKENS
    """Validation tokens per evaluation. With --data, at most those that it has."""
    tokens_per_shard: PositiveInt | None = None
    """Training tokens in one shard of text. Defaults to an estimate for ClimbMix."""
    json: bool = False
    """Print one JSON object instead of tables."""


def build_plan(config: PlanConfig, cache_dir: Path) -> dict[str, Any]:
    """Return the figures of a run, as `archerchat plan --depth N --json` prints them.

    `cache_dir` keeps this machine's measured rate, if it is needed.

    Raises:
        UsageError: the card is unknown, or no micro-batch divides the batch.
    """
    hp = build_hyperparameters(config.dial, config.vocab_size or VOCAB_SIZE)
    schedule = build_schedule(config.dial, hp)
    rows = grad_accum_steps(hp.total_batch_tokens, 1, hp.model.sequence_length, config.num_gpus)
    runtime, gpu = _choose_device(config.gpu)
    memory_bytes = gpu.memory_gib * 2**30 if gpu and config.gpu else runtime.total_memory_bytes()
    if config.gpu_memory:
        memory_bytes = int(config.gpu_memory * 2**30)
    peak = peak_flops(runtime, cache_dir)
    machine = {
        "name": runtime.device_name,
        "device_type": runtime.device.type,
        "compute_dtype": dtype_name(runtime.compute_dtype),
        "flops_per_second": peak.flops_per_second,
        "flops_source": peak.source,
        "memory_bytes": memory_bytes,
        "assumed_mfu": assume_mfu(runtime.device.type, gpu),
        "gpu": gpu and asdict(gpu),
    }
    return {
        "hyperparameters": _describe_hyperparameters(hp),
        "schedule": asdict(schedule),
        "schedule_points": _schedule_points(schedule),
        "machine": machine,
        "num_gpus": config.num_gpus,
        "data": _plan_data(config, hp.total_tokens),
        "memory": _plan_memory(config, hp, runtime, memory_bytes, rows),
        "time": _plan_time(config, hp, gpu, machine),
    }


def assume_mfu(device_type: str, gpu: Gpu | None) -> float:
    """Return the share of the peak rate that training is assumed to reach."""
    share = MFU_DATA_CENTRE if gpu is None or gpu.rented else MFU_GEFORCE
    return share if device_type == "cuda" else MFU_CPU


def _choose_device(gpu_name: str | None) -> tuple[Runtime, Gpu | None]:
    """Look up a card by name, or this machine's device if the name is None."""
    if gpu_name is None:
        runtime = build_runtime()
        return runtime, find_gpu(runtime.device_name) if runtime.device.type == "cuda" else None
    gpu = find_gpu(gpu_name) or find_gpu(f"RTX {gpu_name}")
    if gpu is None:
        known = ", ".join(gpu.name for gpu in known_gpus())
        raise UsageError(f"no published figures for GPU {gpu_name!r}; known are: {known}")
    dtype = training_dtype(gpu.capability)
    return Runtime(torch.device("cuda"), dtype, gpu.name, "published"), gpu


def _describe_hyperparameters(hp: Hyperparameters) -> dict[str, Any]:
    model, counts = hp.model, hp.parameters
    return asdict(hp) | {
        "parameters": asdict(counts) | {"total": counts.total, "scaling": counts.scaling},
        "total_tokens": hp.total_tokens,
        "total_flops": hp.total_flops,
        "head_dim": model.head_dim,
        "windows": model.windows,
        "padded_vocab_size": model.padded_vocab_size,
        "value_embedding_layers": sum(map(model.has_value_embedding, range(model.num_layers))),
    }


def _schedule_points(schedule: Schedule) -> list[tuple[int, float, float, float]]:
    """Return iteration, rate multiplier, Muon momentum and weight decay where a ramp turns."""
    last = schedule.num_iterations
    turns = {0, schedule.warmup_steps, MOMENTUM_WARMUP_STEPS, schedule.warmdown_start, last}
    rate, momentum = schedule.lr_multiplier, schedule.muon_momentum
    decay = schedule.muon_weight_decay
    return [(it, rate(it), momentum(it), decay(it)) for it in sorted(turns) if it <= last]


def shards_for_depth(depth: int, most: int) -> int:
    """Return how many training shards a model of this depth needs by default, at most `most`."""
    tokens = build_hyperparameters(DialConfig(depth), VOCAB_SIZE).total_tokens
    return min(math.ceil(tokens / TOKENS_PER_SHARD), most)


def _plan_data(config: PlanConfig, total_tokens: int) -> dict[str, Any]:
    per_shard = config.tokens_per_shard or TOKENS_PER_SHARD
    shards = min(math.ceil(total_tokens / per_shard), TRAIN_SHARDS)
    return {
        "tokens_per_shard": per_shard,
        "train_shards": shards,
        "epochs": max(1.0, total_tokens / (shards * per_shard)),
        "download_bytes": (shards + 1) * SHARD_BYTES,
    }


def _plan_memory(
    config: PlanConfig, hp: Hyperparameters, runtime: Runtime, memory_bytes: int, rows: int
) -> dict[str, Any]:
    """Plan one rank's memory, with the most rows per micro-batch that fit; None if not one does."""
    model, dtype = hp.model, runtime.compute_dtype
    estimate, size, recomputes = fit_micro_batch(
        model,
        dtype,
        runtime.device,
        config.num_gpus,
        memory_bytes,
        rows,
        recomputes=config.activation_checkpointing,
        state_dtype=DTYPES[config.optimizer_state],
    )
    return {
        "estimate": asdict(estimate) | {"fixed": estimate.fixed},
        "device_bytes": memory_bytes,
        "recomputes": recomputes,
        "device_batch_size": size,
        "grad_accum_steps": None if size is None else rows // size,
        "peak_bytes": estimate.total(size or 1),
        "kv_bytes_per_token": kv_bytes_per_token(model, dtype),
        "kv_cache_bytes": kv_cache_bytes(model, dtype, model.sequence_length),
    }


def _plan_time(
    config: PlanConfig, hp: Hyperparameters, gpu: Gpu | None, machine: dict[str, Any]
) -> dict[str, Any]:
    """Plan hours, dollars, and the energy of the cards alone; None for what is not known."""
    mfu, steps = config.mfu or machine["assumed_mfu"], hp.num_iterations
    rate = config.num_gpus * machine["flops_per_second"] * mfu
    evaluations = 0 if config.eval_every is None else math.ceil(steps / config.eval_every)
    evaluated = evaluations * config.eval_tokens * hp.flops_per_token * FORWARD_SHARE
    evaluation_hours = evaluated / rate / 3600
    hours = hp.total_flops / rate / 3600 + evaluation_hours
    price, note = config.prices.per_hour(gpu)
    return {
        "mfu": mfu,
        "tokens_per_second": rate / hp.flops_per_token,
        "num_evaluations": evaluations,
        "evaluation_hours": evaluation_hours,
        "hours": hours,
        "price_per_hour": price,
        "price_note": note,
        "cost": None if price is None else price * hours * config.num_gpus,
        "kwh": None if gpu is None else hours * config.num_gpus * gpu.board_watts / 1000,
    }
