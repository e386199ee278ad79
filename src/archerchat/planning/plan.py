"""What a depth will take before it is trained: data, memory, hours, money.

The dial decides everything about the run exactly; the rest is arithmetic on published or
measured rates and on assumptions, each of which is a flag or a constant here with its reason.
`build_plan` returns plain numbers; `commands/plan.py` prints them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from archerchat.dial import DialConfig, Hyperparameters, build_hyperparameters, grad_accum_steps
from archerchat.errors import UsageError
from archerchat.optim.schedule import MOMENTUM_WARMUP_STEPS, Schedule, build_schedule
from archerchat.planning.gpus import GPUS, Gpu, find_gpu
from archerchat.planning.memory import (
    MemoryEstimate,
    estimate_memory,
    kv_bytes_per_token,
    kv_cache_bytes,
    max_device_batch_size,
)
from archerchat.planning.peak_flops import peak_flops
from archerchat.runtime import DTYPES, build_runtime, dtype_name, training_dtype

CHARACTERS_PER_SHARD = 250_000_000
"""Of the hub's shards, about 100 MB each compressed."""
SHARD_BYTES = 100_000_000
CHARACTERS_PER_TOKEN = 4.4
"""Measured: a 32,768-token vocabulary on validation text of 24 MB of English prose and docs."""
KEPT_BY_PACKING = 0.75
"""Share of tokens that best-fit packing keeps at 2,048 tokens: simulated 0.72 to 0.78 for
document lengths like the web's (mean 800 to 1,000 tokens); 0.95 for short, even ones."""
TRAIN_SHARDS = 6542
"""Of climbmix-400b-shuffle (SPEC section 4)."""

MFU_DATA_CENTRE = 0.40
MFU_GEFORCE = 0.65
"""Slower tensor cores are easier to keep busy: SPEC section 11's speeds on the RTX 5060 Ti are 66 %
(d8) and 72 % (d12) of its published rate."""
MFU_CPU = 0.20
DOLLARS_PER_H100_HOUR = 3.0
"""Eight of them for two hours at $48. Other rented cards are priced by their rate against it."""
H100_TFLOPS = 989.4


@dataclass(frozen=True)
class PlanConfig:
    """Say what a depth will take, before it is trained."""

    dial: DialConfig
    """The run."""
    vocab_size: int = 32768
    """Tokens that the tokenizer will know."""
    gpu: str | None = None
    """Card to train on, such as "RTX 5060 Ti" or "H100"; this machine's device if not given."""
    gpu_memory: float | None = None
    """Memory of one card in GiB; published if not given."""
    num_gpus: int = 1
    """Cards, one rank each."""
    mfu: float | None = None
    """Share of the peak rate that training will reach; assumed by kind of device if not given."""
    price_per_hour: float | None = None
    """Dollars for one card for an hour; assumed for cards that are usually rented."""
    price_per_kwh: float = 0.30
    """Dollars for a kilowatt-hour, for a card of your own."""
    tokens_per_shard: int | None = None
    """Training tokens that one shard of text yields; estimated for ClimbMix if not given."""
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
    """Published figures, where there are any."""


@dataclass(frozen=True)
class DataPlan:
    tokens_per_shard: int
    train_shards: int
    """To download, never more than there are."""
    epochs: float
    """Times over them; more than 1 only where the source runs out."""
    download_bytes: int
    """With the validation shard."""


@dataclass(frozen=True)
class MemoryPlan:
    estimate: MemoryEstimate
    device_bytes: int
    device_batch_size: int | None
    """Rows in a micro-batch; None where not even one fits."""
    grad_accum_steps: int | None
    peak_bytes: int
    """With that batch; with one row where none fits."""
    kv_bytes_per_token: int
    kv_cache_bytes: int
    """Of one row of `max_seq_len` tokens."""


@dataclass(frozen=True)
class TimePlan:
    mfu: float
    mfu_is_assumed: bool
    tokens_per_second: float
    hours: float
    price_per_hour: float | None
    """Dollars for one card; None where it is not rented."""
    price_is_assumed: bool
    rent: float | None
    kwh: float | None
    """Of the cards alone, at their board power; None where that is unknown."""
    energy_cost: float | None
    """None where the card is rented: its price includes it."""


@dataclass(frozen=True)
class Plan:
    """Everything that `archerchat plan` prints."""

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
    """Work out what a run will take.

    Args:
        config: the run and the machine.
        cache_dir: keeps this machine's measured rate, where that is needed.

    Raises:
        UsageError: the run is impossible, the card is unknown, or a number makes no sense.
    """
    _check(config)
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
    """Look a card up, or describe the device of this machine.

    Raises:
        UsageError: the card is unknown; lists those that are.
    """
    if gpu_name is not None:
        gpu = find_gpu(gpu_name) or find_gpu(f"RTX {gpu_name}")
        if gpu is None:
            known = ", ".join(gpu.name for gpu in GPUS)
            raise UsageError(f"no published figures for GPU {gpu_name!r}; known are: {known}")
        dtype = training_dtype(gpu.capability)
        published = gpu.flops_per_second(dtype)
        assert published is not None  # a test holds the table to it
        return Machine(
            name=gpu.name,
            device_type="cuda",
            compute_dtype=dtype_name(dtype),
            flops_per_second=published,
            flops_source=f"table: dense {dtype_name(dtype)}, float32 accumulate",
            memory_bytes=int((memory_gib or gpu.memory_gib) * 2**30),
            assumed_mfu=MFU_DATA_CENTRE if gpu.rented else MFU_GEFORCE,
            gpu=gpu,
        )
    runtime = build_runtime()
    peak = peak_flops(runtime, cache_dir)
    is_cuda = runtime.device.type == "cuda"
    gpu = find_gpu(runtime.device_name) if is_cuda else None
    owned = gpu is not None and not gpu.rented
    return Machine(
        name=runtime.device_name,
        device_type=runtime.device.type,
        compute_dtype=dtype_name(runtime.compute_dtype),
        flops_per_second=peak.flops_per_second,
        flops_source=peak.source,
        memory_bytes=int(memory_gib * 2**30) if memory_gib else runtime.total_memory_bytes(),
        assumed_mfu=MFU_GEFORCE if owned else MFU_DATA_CENTRE if is_cuda else MFU_CPU,
        gpu=gpu,
    )


def _schedule_points(schedule: Schedule) -> tuple[tuple[int, float, float, float], ...]:
    last = schedule.num_iterations
    turns = {0, schedule.warmup_steps, MOMENTUM_WARMUP_STEPS, schedule.warmdown_start, last}
    return tuple(
        (
            it,
            schedule.lr_multiplier(it),
            schedule.muon_momentum(it),
            schedule.muon_weight_decay(it),
        )
        for it in sorted(turns)
        if it <= last
    )


def _plan_data(config: PlanConfig, total_tokens: int) -> DataPlan:
    per_shard = config.tokens_per_shard or int(
        CHARACTERS_PER_SHARD / CHARACTERS_PER_TOKEN * KEPT_BY_PACKING
    )
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
    dtype = DTYPES[machine.compute_dtype]
    estimate = estimate_memory(hp.model, dtype, torch.device(machine.device_type), config.num_gpus)
    size = max_device_batch_size(estimate, machine.memory_bytes, rows)
    return MemoryPlan(
        estimate=estimate,
        device_bytes=machine.memory_bytes,
        device_batch_size=size,
        grad_accum_steps=None if size is None else rows // size,
        peak_bytes=estimate.total(size or 1),
        kv_bytes_per_token=kv_bytes_per_token(hp.model, dtype),
        kv_cache_bytes=kv_cache_bytes(hp.model, dtype, hp.model.sequence_length),
    )


def _plan_time(config: PlanConfig, hp: Hyperparameters, machine: Machine) -> TimePlan:
    mfu = machine.assumed_mfu if config.mfu is None else config.mfu
    rate = config.num_gpus * machine.flops_per_second * mfu
    hours = hp.total_flops / rate / 3600
    price = config.price_per_hour
    gpu = machine.gpu
    if price is None and gpu is not None and gpu.rented:
        price = DOLLARS_PER_H100_HOUR * gpu.tflops / H100_TFLOPS
    kwh = None if gpu is None else hours * config.num_gpus * gpu.board_watts / 1000
    return TimePlan(
        mfu=mfu,
        mfu_is_assumed=config.mfu is None,
        tokens_per_second=rate / hp.flops_per_token,
        hours=hours,
        price_per_hour=price,
        price_is_assumed=config.price_per_hour is None and price is not None,
        rent=None if price is None else price * hours * config.num_gpus,
        kwh=kwh,
        energy_cost=None if kwh is None or price is not None else kwh * config.price_per_kwh,
    )


def _check(config: PlanConfig) -> None:
    positive = ("gpu_memory", "num_gpus", "mfu", "tokens_per_shard")
    for name in (*positive, "price_per_hour", "price_per_kwh"):
        value = getattr(config, name)
        low = math.ulp(0.0) if name in positive else 0.0
        high = 1.0 if name == "mfu" else torch.finfo(torch.float64).max
        if value is not None and not low <= value <= high:
            allowed = "in (0, 1]" if name == "mfu" else "positive" if low else "0 or more"
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be {allowed}")
