"""Choose the fastest attention backend for windows on a card: timed once, remembered on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from archerchat.files import recall, remember
from archerchat.model.attention import Backend, attend, prepare_mask
from archerchat.model.compiling import compiled
from archerchat.model.config import ModelConfig
from archerchat.planning.peak_flops import cache_key
from archerchat.runtime import Runtime

CACHE_FILE = "window_speed.json"
CANDIDATES: tuple[Backend, ...] = ("flex", "varlen")


def fastest_for_windows(
    runtime: Runtime,
    config: ModelConfig,
    rows: int,
    cache_dir: Path,
    candidates: Sequence[Backend] = CANDIDATES,
) -> tuple[Backend, str]:
    """Return the fastest backend for a model's shortest window, and the times of all.

    Args:
        cache_dir: holds `window_speed.json`. If it cannot be written, the next run measures again.
    """
    window, length, dim = min(config.windows), config.sequence_length, config.head_dim
    heads, kv_heads = config.num_heads, config.num_kv_heads
    shape = f"{rows} rows of {length}, {heads}/{kv_heads} heads of {dim}"
    path, key = cache_dir / CACHE_FILE, f"{cache_key(runtime)}, {shape}, window {window}"
    try:
        seconds = {name: float(recall(path)[key][name]) for name in candidates}
    except (ValueError, KeyError, TypeError):
        sizes = rows, length, heads, dim
        seconds = {c: time_attention(runtime, sizes, kv_heads, window, c) for c in candidates}
        remember(path, key, seconds)
    best = min(candidates, key=lambda name: seconds[name])
    times = ", ".join(f"{name} {1000 * time:.2f} ms" for name, time in seconds.items())
    return best, f"fastest of {times} for windows of {window}"


def time_attention(
    runtime: Runtime, shape: tuple[int, int, int, int], kv_heads: int, window: int, backend: Backend
) -> float:
    """Return the seconds of one layer's attention (B, T, H, D), forward and backward."""
    batch, length, heads, dim = shape
    q, k, v, upstream = (
        torch.randn(batch, length, n, dim, device=runtime.device, dtype=runtime.compute_dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    mask = prepare_mask(length, window, runtime.device, backend)
    run = compiled(attend) if backend == "flex" else attend

    def both() -> None:
        torch.autograd.grad(run(q, k, v, window, backend, mask), inputs, upstream)

    return runtime.median_seconds(both)
