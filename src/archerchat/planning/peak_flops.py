"""Find the peak rate of one device's matrix products: the denominator of MFU.

If `gpus.toml` has the card and the dtype, the rate is the published one. Other devices, CPUs too,
are measured: the best rate of several products, square ones and those of a training step, each
tried repeatedly so that a busy moment does not matter. A measurement takes under two seconds and is
cached on disk, so every run on a machine divides by the same number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch

from archerchat.files import recall, remember
from archerchat.planning.gpus import find_gpu
from archerchat.runtime import Runtime, dtype_name

CACHE_FILE = "peak_flops.json"
Shape = Sequence[int]
"""Rows, inputs and outputs of a linear layer."""
CPU_SHAPES: tuple[Shape, ...] = (
    (512, 512, 512),
    (2048, 256, 1024),
    (2048, 1024, 256),
    (1024, 1024, 1024),
    (2048, 2048, 2048),
)
ACCELERATOR_SHAPES = (8192, 1024, 4096), *((n, n, n) for n in (2048, 4096, 8192))
ROUNDS = 3
MEASURE_SECONDS = 1.5


@dataclass(frozen=True)
class PeakFlops:
    flops_per_second: float
    """Finite and positive; of one device, not of all ranks."""
    source: str
    """Origin of the figure, in words: "table: ..." or "measured: ..."."""


@dataclass(frozen=True)
class Measurement:
    """One device's best product."""

    flops_per_second: float
    shape: Shape
    dtype: str


def peak_flops(runtime: Runtime, cache_dir: Path) -> PeakFlops:
    """Look up, recall or measure the peak rate of `runtime`'s device in its compute dtype.

    Args:
        cache_dir: holds `peak_flops.json`. If it cannot be written, the next run measures again.
    """
    gpu, dtype = find_gpu(runtime.device_name), runtime.compute_dtype
    if gpu and runtime.device.type == "cuda" and (rate := gpu.flops_per_second(dtype)):
        return PeakFlops(rate, f"table: {gpu.name}, dense {dtype_name(dtype)}, float32 accumulate")
    path, key = cache_dir / CACHE_FILE, cache_key(runtime)
    try:
        measured, origin = Measurement(**recall(path)[key]), "cached"
    except (KeyError, TypeError):  # not measured yet, or written by another version
        measured, origin = measure_peak(runtime), "just now"
        remember(path, key, asdict(measured))
    shape = f"{'x'.join(map(str, measured.shape))} {measured.dtype}"
    remedy = f" (machine busy then? delete {path})" if path.exists() else ""
    source = f"measured: {shape} product on {runtime.device_name}{remedy}, {origin}"
    return PeakFlops(measured.flops_per_second, source)


def cache_key(runtime: Runtime) -> str:
    """Name everything that a measured rate depends on."""
    threads = torch.get_num_threads() if runtime.device.type == "cpu" else 0
    dtype = dtype_name(runtime.compute_dtype)
    return f"{runtime.device_name} | {dtype} | {threads} threads | torch {torch.__version__}"


def measure_peak(runtime: Runtime, seconds: float = MEASURE_SECONDS) -> Measurement:
    """Return the best rate over a few shapes of products.

    On a CPU float32 is tried too: a dtype that the processor only emulates is far slower, and a
    step that does part of its work in float32 would exceed that "peak".

    Args:
        seconds: approximate time for all shapes; a shape is skipped if a few of its products would
            take longer than the time left.
    """
    is_cpu = runtime.device.type == "cpu"
    shapes = CPU_SHAPES if is_cpu else ACCELERATOR_SHAPES
    dtypes = dict.fromkeys([runtime.compute_dtype, *([torch.float32] if is_cpu else [])])
    slots = [*product(shapes, dtypes)] * ROUNDS
    best: dict[torch.dtype, Measurement] = {}
    deadline = time.perf_counter() + seconds
    for i, (shape, dtype) in enumerate(slots):
        left = deadline - time.perf_counter()
        if dtype in best and 4 * _flops(shape) > left * best[dtype].flops_per_second:
            continue
        rate = _product_rate(runtime, shape, dtype, left / (len(slots) - i))
        if dtype not in best or rate > best[dtype].flops_per_second:
            best[dtype] = Measurement(rate, shape, dtype_name(dtype))
    return max(best.values(), key=lambda measured: measured.flops_per_second)


@torch.no_grad()
def _product_rate(runtime: Runtime, shape: Shape, dtype: torch.dtype, seconds: float) -> float:
    """Return the FLOP/s of the fastest of the products that fit in `seconds`."""
    # Its own generator: measuring must not move the random numbers of a training run.
    rows, inputs, outputs = shape
    device = runtime.device
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator, device=device).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator, device=device).to(dtype)
    out = torch.empty(rows, outputs, device=device, dtype=dtype)
    torch.mm(x, weight.T, out=out)  # warms up caches, clocks and kernel selection
    runtime.synchronize()
    fastest, deadline = math.inf, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        torch.mm(x, weight.T, out=out)
        runtime.synchronize()
        stop = time.perf_counter()
        fastest = min(fastest, max(stop - start, 1e-9))
        if stop >= deadline:
            return _flops(shape) / fastest


def _flops(shape: Shape) -> int:
    return 2 * math.prod(shape)
