"""Fit a run to its device: the attention backend, the micro-batch, 8-bit products.

What is measured is the same on all ranks, and is kept in the home's cache where it costs much.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from archerchat.distributed import Ranks
from archerchat.errors import UsageError
from archerchat.files import recall, remember
from archerchat.model.attention import Backend, choose_backend, runs_varlen
from archerchat.model.config import ModelConfig
from archerchat.planning.peak_flops import cache_key
from archerchat.planning.window_speed import fastest_for_windows
from archerchat.runtime import Runtime
from archerchat.training.recipe import Recipe

ROWS_FILE = "device_batch_size.json"
"""Which micro-batch fitted for which model on which card, in the home's cache."""


def choose_attention(
    runtime: Runtime,
    ranks: Ranks,
    cache_dir: Path,
    model: ModelConfig,
    rows: int,
    *,
    forced: str | None = None,
    compile: bool = True,
    document_masking: bool = False,
) -> tuple[Backend, str]:
    """Pick the attention backend, one that can keep documents apart where that is asked for.

    Args:
        rows: of a micro-batch.

    Returns:
        The backend and the reason for it.

    Raises:
        UsageError: the forced one cannot run here, or cannot keep documents apart.
    """
    try:
        backend, reason = choose_backend(runtime.device, runtime.compute_dtype, forced)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if document_masking and backend == "flash":
        if forced is not None:
            raise UsageError(
                "--attention flash cannot keep the conversations of a row apart: leave "
                "--attention out, or --document-masking"
            )
        backend, reason = "flex", "keeps the conversations of a row apart"
    if forced is not None or backend != "flex":
        return backend, reason
    if not compile:  # flex has to be compiled
        varlen = runs_varlen(runtime.device, runtime.compute_dtype)
        return "varlen" if varlen else "sdpa", "not compiled"
    if document_masking or min(model.windows) == model.sequence_length:
        return backend, reason
    timed = fastest_for_windows(runtime, model, rows, cache_dir)
    first: tuple[Backend, str] = ranks.gather(timed)[0]
    return first


def fit_rows(recipe: Recipe, rows: int, cache_dir: Path, notify: Callable[[str], object]) -> int:
    """Halve the micro-batch until a forward and a backward pass fit on every rank.

    Args:
        rows: to begin with, unless fewer fitted an earlier run of this shape.

    Returns:
        The rows that fit.

    Raises:
        torch.OutOfMemoryError: not even one does.
    """
    model, runtime, ranks = recipe.model, recipe.runtime, recipe.optimizer.ranks
    shape = f"{json.dumps(asdict(model.config))} | again {model.recomputes}"
    path, key = cache_dir / ROWS_FILE, f"{cache_key(runtime)} | {shape}"
    known = recall(path).get(key)
    usable = isinstance(known, int) and 0 < known < rows
    rows = min(ranks.gather(known if usable else rows))
    while True:
        tokens = torch.zeros(
            rows, model.config.sequence_length, dtype=torch.long, device=runtime.device
        )
        too_large = False
        try:
            for _ in range(2):  # the second time there are gradients already
                recipe.loss(tokens, tokens).backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            too_large = True
        finally:
            recipe.optimizer.zero_grad()
        if not ranks.any(too_large)[0]:
            if runtime.is_master:
                remember(path, key, rows)
            return rows
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        notify(f"{rows} rows per micro-batch do not fit into memory: {rows // 2} now")
        rows //= 2


def speed_of_fp8(recipe: Recipe, rows: int) -> float:
    """Return how many times as fast a forward and a backward pass are with 8-bit products."""
    model, ranks = recipe.model, recipe.optimizer.ranks
    shape = rows, model.config.sequence_length
    tokens = torch.randint(model.config.vocab_size, shape, device=model.device)

    def work() -> None:
        recipe.loss(tokens, tokens).backward()  # type: ignore[no-untyped-call]
        recipe.optimizer.zero_grad()

    seconds = []
    for used in (False, True):
        model.use_fp8(used)
        seconds.append(recipe.runtime.median_seconds(work))
    plain, in_8_bits = ranks.mean(*seconds)
    return plain / in_8_bits
