"""How fast one device can multiply matrices: the denominator of MFU.

Published figures where `gpus.py` has the card and the dtype. Anything else, CPUs included, is
measured: the best rate of a few square products in the compute dtype, about a second in all,
cached on disk, so that every run on a machine divides by the same number.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from archerchat.artifacts import write_json
from archerchat.gpus import find_gpu
from archerchat.runtime import Runtime, dtype_name

CACHE_FILE = "peak_flops.json"
CPU_SIZES = (512, 1024, 2048)
ACCELERATOR_SIZES = (2048, 4096, 8192)
MEASURE_SECONDS = 1.0
ABSURD_RATE = 1e20
"""No one device multiplies this fast: a cached rate beyond it is corrupt."""


@dataclass(frozen=True)
class PeakFlops:
    """Give one device's peak rate, and where the figure comes from."""

    flops_per_second: float
    """Finite and positive; of one device, not of all ranks."""
    source: str
    """For people: "table: ..." or "measured: ..."."""


def peak_flops(runtime: Runtime, cache_dir: Path) -> PeakFlops:
    """Look up, recall or measure the peak rate of `runtime`'s device in its compute dtype.

    Args:
        runtime: names the device and the dtype.
        cache_dir: holds `peak_flops.json`; an entry that cannot be used is measured again, and a
            directory that cannot be written only costs the next run a second. Delete the file
            if the machine was busy when it was measured.
    """
    dtype = runtime.compute_dtype
    if runtime.device.type == "cuda":
        gpu = find_gpu(runtime.device_name)
        published = gpu.flops_per_second(dtype) if gpu else None
        if gpu and published:
            source = f"table: {gpu.name}, dense {dtype_name(dtype)}, float32 accumulate"
            return PeakFlops(published, source)
    path, key = cache_dir / CACHE_FILE, cache_key(runtime)
    entries = _load_entries(path)
    entry, origin = entries.get(key), "cached"
    if entry is None:
        rate, size = measure_peak(runtime)
        entry, origin = {"flops_per_second": rate, "size": size}, "just now"
        try:
            write_json(path, {**entries, key: entry})
        except OSError as error:
            origin += f", not cached ({error.strerror})"
    shape = "x".join([str(entry["size"])] * 3)
    return PeakFlops(
        entry["flops_per_second"],
        f"measured: {shape} {dtype_name(dtype)} product on {runtime.device_name}, {origin}",
    )


def cache_key(runtime: Runtime) -> str:
    """Name everything that a measured rate depends on."""
    threads = torch.get_num_threads() if runtime.device.type == "cpu" else 0
    dtype = dtype_name(runtime.compute_dtype)
    return f"{runtime.device_name} | {dtype} | {threads} threads | torch {torch.__version__}"


def measure_peak(runtime: Runtime, seconds: float = MEASURE_SECONDS) -> tuple[float, int]:
    """Return the best rate over a few sizes of square products, and the size that reached it.

    Args:
        runtime: the device and the dtype.
        seconds: about how long to measure; a larger size is left out when one product of it
            would take longer than what is left.
    """
    best, best_size = 0.0, 0
    sizes = CPU_SIZES if runtime.device.type == "cpu" else ACCELERATOR_SIZES
    deadline = time.perf_counter() + seconds
    for i, size in enumerate(sizes):
        left = deadline - time.perf_counter()
        if best and 2 * size**3 / best > left / 3:
            break
        rate = _product_rate(runtime, size, left / (len(sizes) - i))
        if rate > best:
            best, best_size = rate, size
    return best, best_size


@torch.no_grad()
def _product_rate(runtime: Runtime, size: int, seconds: float) -> float:
    """Return the FLOP/s of the fastest of the `size`^3 products that fit in `seconds`."""
    # Its own generator: measuring must not move the random numbers of a training run.
    device, dtype = runtime.device, runtime.compute_dtype
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)  # warms up caches, clocks and kernel selection
    runtime.synchronize()
    fastest, deadline = math.inf, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        runtime.synchronize()
        stop = time.perf_counter()
        fastest = min(fastest, max(stop - start, 1e-9))
        if stop >= deadline:
            return 2 * size**3 / fastest


def _load_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Return the usable entries of the cache; a file that is not one counts as empty."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: entry for key, entry in content.items() if _is_usable(entry)}


def _is_usable(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    rate, size = entry.get("flops_per_second"), entry.get("size")
    return isinstance(size, int) and isinstance(rate, float) and 0 < rate < ABSURD_RATE
