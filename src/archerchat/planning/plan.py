"""Estimate what training a model of some depth takes: data, memory, hours, money.

The dial gives the run's size exactly. The rest is computed from published or measured rates and
from assumptions, each of which is a flag or a constant here with its reason.
`build_plan` returns plain numbers; `commands/plan.py` prints them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from archerchat.config import Config, PositiveFloat, PositiveInt, Share, StateDtypeName
from archerchat.dial import DialConfig, Hyperparameters, build_hyperparameters, grad_accum_steps
from archerchat.errors import UsageError
from archerchat.optim.schedule import MOMENTUM_WARMUP_STEPS, Schedule, build_schedule
from archerchat.planning.gpus import GPUS, Gpu, Prices, find_gpu
from archerchat.planning.memory import (
    MemoryEstimate,
    fit_micro_batch,
    kv_bytes_per_token,
    kv_cache_bytes,
)
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
EVAL_EVERY = 250
EVAL_TOKENS = 41_943_040
"""Pretraining's defaults: steps between evaluations, and validation tokens of each."""
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
    """Name of the tokenizer to measure --data with."""
    vocab_size: PositiveInt = VOCAB_SIZE
    """Size of the vocabulary. With --data it is the tokenizer's."""
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
    """Validation tokens per evaluation."""
    tokens_per_shard: PositiveInt | None = None
    """Training tokens in one shard of text. Defaults to an estimate for ClimbMix."""
    json: bool = False
    """Print one JSON object instead of tables."""


@dataclass(frozen=True)
class Machine:
    """The device that a plan is for."""

    name: str
    device_type: str
    """cuda, mps or cpu."""
    compute_dtype: str
    flops_per_second: float
    flops_source: str
    memory_bytes: int
    assumed_mfu: float
    gpu: Gpu | None = None
    """Published figures, if there are any."""


@dataclass(frozen=True)
class DataPlan:
    tokens_per_shard: int
    train_shards: int
    """Training shards to download, at most all that exist."""
    epochs: float
    """Passes over these shards; more than 1 only if the source has too few."""
    download_bytes: int
    """Size of the training shards and the validation shard."""


@dataclass(frozen=True)
class MemoryPlan:
    estimate: MemoryEstimate
    device_bytes: int
    recomputes: bool
    """Whether the backward pass computes each layer again (--activation-checkpointing)."""
    device_batch_size: int | None
    """Rows per micro-batch; None if not even one fits."""
    grad_accum_steps: int | None
    peak_bytes: int
    """Peak memory at that batch size, or at one row if no batch size fits."""
    kv_bytes_per_token: int
    kv_cache_bytes: int
    """KV cache of one row of `max_seq_len` tokens."""


@dataclass(frozen=True)
class TimePlan:
    mfu: float
    tokens_per_second: float
    num_evaluations: int
    evaluation_hours: float
    hours: float
    """Training and evaluations."""
    price_per_hour: float | None
    """Dollars per hour for one card: its rent, or its electricity; None if unknown."""
    price_note: str
    """What the price is, and whether it is assumed."""
    cost: float | None
    kwh: float | None
    """Energy of the cards alone, at their board power; None if that is unknown."""


@dataclass(frozen=True)
class Plan:
    """All figures that `archerchat plan` prints."""

    hyperparameters: Hyperparameters
    schedule: Schedule
    schedule_points: tuple[tuple[int, float, float, float], ...]
    """(iteration, rate multiplier, Muon momentum, Muon weight decay) where a ramp turns."""
    machine: Machine
    num_gpus: int
    data: DataPlan
    memory: MemoryPlan
    time: TimePlan


def build_plan(config: PlanConfig, cache_dir: Path) -> Plan:
    """Estimate what a run takes; `cache_dir` keeps this machine's measured rate, if it is needed.

    Raises:
        UsageError: the run is impossible, or the card is unknown.
    """
    hp = build_hyperparameters(config.dial, config.vocab_size)
    schedule = build_schedule(config.dial, hp)
    # Refuses, with a remedy, a batch that no micro-batch divides.
    rows = grad_accum_steps(hp.total_batch_tokens, 1, hp.model.sequence_length, config.num_gpus)
    machine = describe_machine(config.gpu, config.gpu_memory, cache_dir)
    return Plan(
        hyperparameters=hp,
        schedule=schedule,
        schedule_points=_schedule_points(schedule),
        machine=machine,
        num_gpus=config.num_gpus,
        data=_plan_data(config, hp.total_tokens),
        memory=_plan_memory(config, hp, machine, rows),
        time=_plan_time(config, hp, machine),
    )


def describe_machine(gpu_name: str | None, memory_gib: float | None, cache_dir: Path) -> Machine:
    """Look up a card by name, or describe this machine's device if the name is None."""
    if gpu_name is None:
        runtime = build_runtime()
        gpu = find_gpu(runtime.device_name) if runtime.device.type == "cuda" else None
        memory_bytes = runtime.total_memory_bytes()
    else:
        gpu = find_gpu(gpu_name) or find_gpu(f"RTX {gpu_name}")
        if gpu is None:
            known = ", ".join(gpu.name for gpu in GPUS)
            raise UsageError(f"no published figures for GPU {gpu_name!r}; known are: {known}")
        dtype = training_dtype(gpu.capability)
        runtime = Runtime(torch.device("cuda"), dtype, gpu.name, "published")
        memory_bytes = gpu.memory_gib * 2**30
    kind, peak = runtime.device.type, peak_flops(runtime, cache_dir)
    return Machine(
        name=runtime.device_name,
        device_type=kind,
        compute_dtype=dtype_name(runtime.compute_dtype),
        flops_per_second=peak.flops_per_second,
        flops_source=peak.source,
        memory_bytes=int(memory_gib * 2**30) if memory_gib else memory_bytes,
        assumed_mfu=assume_mfu(kind, runtime.device_name),
        gpu=gpu,
    )


def assume_mfu(device_type: str, device_name: str) -> float:
    """Return the share of the peak rate that training is assumed to reach."""
    if (gpu := find_gpu(device_name)) and not gpu.rented:
        return MFU_GEFORCE
    return MFU_DATA_CENTRE if device_type == "cuda" else MFU_CPU


def _schedule_points(schedule: Schedule) -> tuple[tuple[int, float, float, float], ...]:
    last = schedule.num_iterations
    turns = {0, schedule.warmup_steps, MOMENTUM_WARMUP_STEPS, schedule.warmdown_start, last}
    rate, momentum = schedule.lr_multiplier, schedule.muon_momentum
    decay = schedule.muon_weight_decay
    return tuple((it, rate(it), momentum(it), decay(it)) for it in sorted(turns) if it <= last)


def shards_for_depth(depth: int, most: int) -> int:
    """Return how many training shards a model of this depth needs by default, at most `most`."""
    tokens = build_hyperparameters(DialConfig(depth), VOCAB_SIZE).total_tokens
    return min(math.ceil(tokens / TOKENS_PER_SHARD), most)


def _plan_data(config: PlanConfig, total_tokens: int) -> DataPlan:
    per_shard = config.tokens_per_shard or TOKENS_PER_SHARD
    shards = min(math.ceil(total_tokens / per_shard), TRAIN_SHARDS)
    return DataPlan(
        tokens_per_shard=per_shard,
        train_shards=shards,
        epochs=max(1.0, total_tokens / (shards * per_shard)),
        download_bytes=(shards + 1) * SHARD_BYTES,
    )


def _plan_memory(
    config: PlanConfig, hp: Hyperparameters, machine: Machine, rows: int
) -> MemoryPlan:
    dtype, device = DTYPES[machine.compute_dtype], torch.device(machine.device_type)
    estimate, size, recomputes = fit_micro_batch(
        hp.model,
        dtype,
        device,
        config.num_gpus,
        machine.memory_bytes,
        rows,
        recomputes=config.activation_checkpointing,
        state_dtype=DTYPES[config.optimizer_state],
    )
    return MemoryPlan(
        estimate=estimate,
        device_bytes=machine.memory_bytes,
        recomputes=recomputes,
        device_batch_size=size,
        grad_accum_steps=None if size is None else rows // size,
        peak_bytes=estimate.total(size or 1),
        kv_bytes_per_token=kv_bytes_per_token(hp.model, dtype),
        kv_cache_bytes=kv_cache_bytes(hp.model, dtype, hp.model.sequence_length),
    )


def _plan_time(config: PlanConfig, hp: Hyperparameters, machine: Machine) -> TimePlan:
    mfu, gpu = config.mfu or machine.assumed_mfu, machine.gpu
    rate = config.num_gpus * machine.flops_per_second * mfu
    steps, every = hp.num_iterations, config.eval_every
    evaluations = 0 if every is None else math.ceil(steps / every)
    evaluated = evaluations * config.eval_tokens * hp.flops_per_token * FORWARD_SHARE
    evaluation_hours = evaluated / rate / 3600
    hours = hp.total_flops / rate / 3600 + evaluation_hours
    price, note = config.prices.per_hour(gpu)
    return TimePlan(
        mfu=mfu,
        tokens_per_second=rate / hp.flops_per_token,
        num_evaluations=evaluations,
        evaluation_hours=evaluation_hours,
        hours=hours,
        price_per_hour=price,
        price_note=note,
        cost=None if price is None else price * hours * config.num_gpus,
        kwh=None if gpu is None else hours * config.num_gpus * gpu.board_watts / 1000,
    )
