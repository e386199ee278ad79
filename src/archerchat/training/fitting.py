"""Fit a run to its device: the attention backend, the micro-batch, 8-bit products.

All ranks use the same measurements. Slow ones are kept in the home's cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from archerchat.checkpoint import Checkpoint, load_checkpoint
from archerchat.data.streams import saved_streams
from archerchat.distributed import Ranks
from archerchat.errors import UsageError
from archerchat.files import recall, remember
from archerchat.model.attention import Backend, choose_backend, runs_varlen
from archerchat.model.config import ModelConfig
from archerchat.model.fp8 import MULTIPLE
from archerchat.planning.memory import RESERVED_SHARE, fit_micro_batch
from archerchat.planning.peak_flops import cache_key
from archerchat.planning.window_speed import fastest_for_windows
from archerchat.runtime import Runtime
from archerchat.training.recipe import Recipe
from archerchat.training.resume import saved_rows

ROWS_FILE = "device_batch_size.json"
"""File in the home's cache with the rows that fit, by model and card."""


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
    """Return the attention backend, and the reason for it.

    Args:
        rows: rows per micro-batch.
        document_masking: whether it must keep the conversations of a row apart.

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
    whole = min(model.windows) == model.sequence_length
    if document_masking or whole or not runs_varlen(runtime.device, runtime.compute_dtype):
        return backend, reason
    timed = fastest_for_windows(runtime, model, rows, cache_dir)
    first: tuple[Backend, str] = ranks.gather(timed)[0]
    return first


def choose_rows(
    runtime: Runtime,
    ranks: Ranks,
    model: ModelConfig,
    per_step: int,
    saved: Checkpoint | None,
    usual: int | None = None,
    most: int | None = None,
    *,
    recomputes: bool = False,
    state_dtype: torch.dtype = torch.float32,
    reserved_bytes: int = 0,
) -> tuple[int, bool, bool]:
    """Estimate how many rows per micro-batch fit.

    A resumed run keeps its rows on the kind of device that it was saved on, to be bit-identical.

    Args:
        per_step: rows per optimizer step of one rank.
        usual: rows to use if they fit; None uses as many as fit.
        most: bound on the rows of a new run.
        reserved_bytes: memory of the device that is needed for other things.

    Returns:
        The rows; whether layers must be recomputed; whether the rows are the saved run's.
    """
    memory = max(0, runtime.total_memory_bytes() - reserved_bytes)
    estimate, fitting, recomputes = fit_micro_batch(
        model,
        runtime.compute_dtype,
        runtime.device,
        runtime.world_size,
        memory,
        # A step takes whole micro-batches from each stream of data.
        math.gcd(per_step, per_step * runtime.world_size // _count_streams(saved)),
        recomputes=recomputes,
        state_dtype=state_dtype,
    )
    rows, free = fitting or 1, memory * (1 - RESERVED_SHARE)
    if usual and per_step % usual == 0 and estimate.total(usual) <= free:
        rows = usual
    meta = saved.meta if saved else {}
    began_with, device = saved_rows(meta), (meta.get("hardware") or {}).get("device")
    keeps = began_with > 0 and per_step % began_with == 0 and device == runtime.device_name
    rows = began_with if keeps else min(rows, most or rows)
    # All ranks call this, even if one lacks the saved run or has another card.
    answers = ranks.gather((rows, recomputes, keeps))
    rows = min(answer[0] for answer in answers)
    recomputes, keeps = (any(answer[i] for answer in answers) for i in (1, 2))
    return rows, recomputes, keeps


def _count_streams(saved: Checkpoint | None) -> int:
    if saved is None or "loader" not in saved.hashes:
        return 1
    return saved_streams(load_checkpoint(saved.path, ("loader",)).state["loader"])


def fewer(rows: int) -> int:
    """Return a divisor of `rows`, about half: a step stays a whole number of micro-batches."""
    return next(n for n in range(rows // 2, 0, -1) if rows % n == 0)


def probe_rows(
    recipe: Recipe,
    rows: int,
    cache_dir: Path,
    notify: Callable[[str], object],
    reserved_bytes: int = 0,
) -> int:
    """Lower the micro-batch to smaller divisors until two passes fit on every rank.

    Args:
        rows: the first number to try, unless fewer fitted an earlier run of this shape.
        reserved_bytes: memory of the device that is needed for other things, occupied meanwhile.

    Raises:
        torch.OutOfMemoryError: not even one row fits.
    """
    model, runtime, ranks = recipe.model, recipe.runtime, recipe.optimizer.ranks
    path = cache_dir / ROWS_FILE
    what = {
        **asdict(model.config),
        "recipe": type(recipe).__name__,
        "backend": model.backend,
        "compile": recipe.compile,
        "recomputes": model.recomputes,
        "state": str(recipe.optimizer.state_dtype),
        "ranks": ranks.world_size,
        "memory": runtime.total_memory_bytes(),
        "reserved": reserved_bytes,
    }
    key = f"{cache_key(runtime)} | {json.dumps(what)}"
    known = recall(path).get(key)
    usable = isinstance(known, int) and 0 < known < rows
    rows = min(ranks.gather(known if usable else rows))
    if usable:
        notify(f"{rows} rows per micro-batch fitted before; to try more, delete {path}")
    held = torch.empty(reserved_bytes, dtype=torch.uint8, device=runtime.device)
    while ranks.any(not _fits(recipe, rows))[0]:
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        notify(f"{rows} rows per micro-batch do not fit into memory: trying {fewer(rows)}")
        rows = fewer(rows)
    del held
    if runtime.is_master:
        remember(path, key, rows)
    return rows


def _fits(recipe: Recipe, rows: int) -> bool:
    """Try two passes, the second one with gradients in memory.

    The loss is the one over all positions, since a stage's own needs no more memory.
    """
    length, device = recipe.model.config.sequence_length, recipe.runtime.device
    tokens = torch.zeros(rows, length, dtype=torch.long, device=device)
    try:
        for _ in range(2):
            Recipe.loss(recipe, tokens, tokens).backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError:
        if rows == 1:
            raise
        return False
    finally:
        recipe.optimizer.zero_grad()
    return True


def choose_precision(recipe: Recipe, rows: int, saved: bool | None) -> tuple[bool, float | None]:
    """Train in 8 bits if that makes a forward and a backward pass faster.

    Args:
        saved: whether a resumed run trains in 8 bits.

    Returns:
        Whether to train in 8 bits, and the speed-up if it was measured.

    Raises:
        UsageError: the kernels do not take micro-batches of this size.
    """
    if rows * recipe.model.config.sequence_length % MULTIPLE:
        raise UsageError(
            f"--fp8 needs micro-batches of a multiple of {MULTIPLE} tokens: choose another "
            "--device-batch-size or --max-seq-len"
        )
    speed = None
    if saved is None:
        speed = _speed_of_fp8(recipe, rows)
        saved = speed > 1
    recipe.model.use_fp8(saved)
    return saved, speed


def _speed_of_fp8(recipe: Recipe, rows: int) -> float:
    model, ranks = recipe.model, recipe.optimizer.ranks
    shape = rows, model.config.sequence_length
    tokens = torch.randint(model.config.vocab_size, shape, device=model.device)

    def work() -> None:
        recipe.loss(tokens, tokens).backward()  # type: ignore[no-untyped-call]
        recipe.optimizer.zero_grad()

    seconds = []
    for used in (False, True):
        model.use_fp8(used)
        try:
            seconds.append(recipe.runtime.median_seconds(work))
        except torch.OutOfMemoryError:
            if not used:
                raise
            seconds.append(math.inf)
    plain, in_8_bits = ranks.mean(*seconds)
    return plain / in_8_bits
