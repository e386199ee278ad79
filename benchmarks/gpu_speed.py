"""How fast a training step is on a card, by attention backend, depth and row length.

A step is one of the dial's size: as many micro-batches of the largest batch that fits as make up
half a million tokens, random ones, then the optimizer. MFU is the share of the matrix product that
`gpu_common.py` measured on the same card. With --anatomy, one step is split by kernel family.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from archerchat.dial import DialConfig, build_hyperparameters
from archerchat.model import attention
from archerchat.model.config import ModelConfig
from archerchat.model.flops import flops_per_token
from archerchat.model.fp8 import supports_fp8
from archerchat.model.loss import LossKernels, weighted_loss
from archerchat.model.transformer import Regions, Transformer
from archerchat.optim.optimizer import Optimizer, build_groups
from archerchat.planning.memory import estimate_memory, max_device_batch_size
from archerchat.planning.window_speed import time_attention
from archerchat.runtime import Runtime
from gpu_common import DRY_RUN, LENGTH, Rows, ceilings, model_config, open_rows, start
from measuring import timed

LISTED = 40
"""Kernels that the anatomy prints."""
STEP_TOKENS = 2 * LENGTH if DRY_RUN else 2**19
WARM_UP, TIMED = (1, 2) if DRY_RUN else (1, 3)
LONG = 4 * LENGTH
COMPARED = ("flex", "varlen", "sdpa", "flash")
"""Backends for layers with windows."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    depth: int
    length: int
    backend: str
    windows: str = "SSSL"
    fp8: bool = False
    compile: bool = not DRY_RUN


def available(backend: str, device: torch.device) -> bool:
    if backend == "varlen":
        return attention.runs_varlen(device, torch.bfloat16)
    if backend == "flash":
        return attention.flash_module(device, torch.bfloat16) is not None
    return True


class Training:
    """A model on random tokens, and the step that trains it."""

    def __init__(self, case: Case, config: ModelConfig, batch: int, runtime: Runtime) -> None:
        backend: Any = case.backend
        with runtime.device:  # torch's own initial values, drawn there: quicker, and as good here
            self.model = Transformer(config, runtime.compute_dtype, backend)
        dial = DialConfig(config.num_layers, num_iterations=1000)
        rates = build_hyperparameters(dial, config.vocab_size).learning_rates
        self.model.use_fp8(case.fp8)
        groups = build_groups(self.model, rates)
        self.optimizer = Optimizer(self.model, groups, runtime.compute_dtype, case.compile)
        self.regions = Regions.compiled() if case.compile else Regions()
        self.kernels = LossKernels.compiled() if case.compile else LossKernels()
        shape = 2, batch, config.sequence_length
        self.inputs, self.targets = torch.randint(config.vocab_size, shape).to(runtime.device)
        self.accum = max(1, STEP_TOKENS // (batch * config.sequence_length))
        self.tokens = self.accum * batch * config.sequence_length

    def micro_batch(self) -> None:
        hidden = self.model.hidden(self.inputs, self.regions)
        with record_function("loss"):
            loss = weighted_loss(
                hidden,
                self.model.unembedding.weight,
                self.targets,
                self.model.config.vocab_size,
                kernels=self.kernels,
            )
        (loss / self.accum).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        for _ in range(self.accum):
            self.micro_batch()
        with record_function("optimizer"):
            self.optimizer.step(0.01, 0.95, 0.1)
            self.optimizer.zero_grad()


def with_largest_batch(
    case: Case, runtime: Runtime, work: Callable[[Training, int], dict[str, Any]]
) -> dict[str, Any]:
    """Do `work` with the batch that `plan` says fits, or half of it while memory runs out."""
    config = model_config(case.depth, case.length, case.windows)
    estimate = estimate_memory(config, runtime.compute_dtype, runtime.device)
    rows = STEP_TOKENS // case.length or 1
    batch = max_device_batch_size(estimate, runtime.total_memory_bytes(), rows) or 1
    while True:
        with suppress(torch.OutOfMemoryError):
            runtime.reset_peak_memory()
            figures = work(Training(case, config, batch, runtime), batch)
            return {**figures, "batch": batch, "planned_bytes": estimate.total(batch)}
        if batch == 1:
            raise torch.OutOfMemoryError("not even one row fits")
        batch //= 2
        gc.collect()
        torch.cuda.empty_cache()


def time_case(case: Case, runtime: Runtime, peak: float) -> dict[str, Any]:
    """Measure tokens per second, MFU, and peak memory beside what `plan` says."""

    def work(training: Training, batch: int) -> dict[str, Any]:
        first, _ = timed(runtime.synchronize, training.step)
        for _ in range(WARM_UP):
            training.step()
        times = [timed(runtime.synchronize, training.step)[0] for _ in range(TIMED)]
        rate = training.tokens / statistics.median(times)
        flops = flops_per_token(training.model.config)
        return {
            "backend": case.backend,
            "tokens_per_second": round(rate),
            "mfu": rate * flops / peak,
            "first_step_seconds": first,
            "peak_bytes": runtime.peak_memory_bytes(),
        }

    try:
        return with_largest_batch(case, runtime, work)
    finally:
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def best_backend(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the fastest backend for windows so far."""
    rates = {
        name: rows.get(f"d12 windows {name}", {}).get("tokens_per_second", 0) for name in COMPARED
    }
    best = max(rates, key=lambda name: rates[name])
    return best if rates[best] else "sdpa"


def measure_speed(rows: Rows, runtime: Runtime) -> None:
    """Time every row, the most telling ones first."""
    peak, _ = ceilings(rows)

    def row(name: str, case: Case) -> None:
        rows.measure(name, lambda: time_case(case, runtime, peak))

    row("d12 full sdpa", Case(12, LENGTH, "sdpa", "L"))
    for backend in COMPARED:
        if available(backend, runtime.device):
            row(f"d12 windows {backend}", Case(12, LENGTH, backend))
    best = best_backend(rows.read())
    if supports_fp8(runtime.device):
        row("d12 windows best fp8", Case(12, LENGTH, best, fp8=True))
    row("d12 8k full sdpa", Case(12, LONG, "sdpa", "L"))
    row("d12 8k windows best", Case(12, LONG, best))
    row("d20 windows best", Case(20, LENGTH, best))
    eager = "sdpa" if best == "flex" else best  # flex has to be compiled
    row("d12 windows eager", Case(12, LENGTH, eager, compile=False))


FAMILIES = {
    "attention": ("flash", "fmha", "attention", "attn", "sdpa"),
    "products": ("gemm", "cutlass", "nvjet", "cublas", "::mm", "::bmm", "addmm", "matmul"),
}


def family(kernel: str, above: str) -> str:
    """Name the part of a step that a kernel belongs to, by its name and by what launched it."""
    if "optimizer" in above:
        return "optimizer"
    if "loss" in above or "_WeightedLoss" in above:
        return "loss"
    lowered = kernel.lower()
    for name, parts in FAMILIES.items():
        if any(part in lowered for part in parts):
            return name
    return "elementwise"


def ancestors(event: Any) -> str:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return " ".join(names)


def split_step(training: Training, runtime: Runtime) -> dict[str, Any]:
    """Profile one step; return each family's milliseconds, and those in which nothing ran."""
    for _ in range(WARM_UP + 1):
        training.step()
    activities = [ProfilerActivity.CPU, *([] if DRY_RUN else [ProfilerActivity.CUDA])]
    seconds, _ = timed(runtime.synchronize, training.step)
    with profile(activities=activities) as trace:
        training.step()
        runtime.synchronize()
    spent: dict[str, float] = {}
    by_kernel: Counter[str] = Counter()
    for event in trace.events():
        above = ancestors(event)
        pairs = [(k.name, k.duration) for k in event.kernels]
        if DRY_RUN:
            pairs = [(event.name, event.self_cpu_time_total)]
        for name, microseconds in pairs:
            key = family(name, above)
            spent[key] = spent.get(key, 0.0) + microseconds / 1000
            by_kernel[f"{key}: {name[:90]}"] += microseconds / 1000
    linked, whole = sum(spent.values()), 1000 * seconds
    on_device = sum(
        event.time_range.elapsed_us() / 1000
        for event in trace.events()
        if event.device_type.name == "CUDA" and event.name not in ("loss", "optimizer")
    )
    for name, milliseconds in by_kernel.most_common(LISTED):
        print(f"{milliseconds:9.2f} ms  {name}")
    spent["not linked"] = max(0.0, on_device - linked)
    parts = {name: round(ms, 2) for name, ms in sorted(spent.items(), key=lambda x: -x[1])}
    return {"step_ms": whole, **parts, "gaps": round(max(0.0, whole - max(linked, on_device)), 2)}


def time_layer(backend: Any, length: int, window: int, runtime: Runtime) -> dict[str, Any]:
    """Time one layer of depth 12 over 2^17 tokens, forward and backward, by itself."""
    shape = max(1, STEP_TOKENS // 4 // length), length, 6, 128
    return {"ms": 1000 * time_attention(runtime, shape, 6, window, backend)}


def main() -> None:
    rows, options = open_rows()
    runtime = start()
    if not options.anatomy:
        measure_speed(rows, runtime)
        return
    speed = Rows(rows.path.with_name("speed.jsonl"), math.inf).read()
    case = Case(12, LENGTH, best_backend(speed))
    rows.measure(
        f"d12 {case.backend}",
        lambda: with_largest_batch(case, runtime, lambda t, _: split_step(t, runtime)),
    )
    for length in (LENGTH, LONG):
        for backend in ("full sdpa", *COMPARED):
            kernel = backend.removeprefix("full ")
            window = length - 1 if kernel != backend else length // 4
            if available(kernel, runtime.device):
                work = partial(time_layer, kernel, length, window, runtime)
                rows.measure(f"a layer at {length}, {backend}", work)


if __name__ == "__main__":
    main()
