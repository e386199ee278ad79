"""Fit a run to its device: the attention backend, the micro-batch, 8-bit products.

What is measured is the same on all ranks, and is kept in the home's cache where it costs much.
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
"""File in the home's cache: the rows that fitted, by model and card."""


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
        rows: rows per micro-batch.

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

    A run that is there keeps its rows on the kind of device that it was saved on, so that it
    resumes bit for bit; on another it gets what fits there.

    Args:
        per_step: rows per optimizer step of one rank.
        saved: the checkpoint to resume from.
        usual: rows to take where they fit; None takes as many as fit.
        most: bound on the rows of a new run.
        recomputes: whether the backward pass computes each layer again in any case.
        state_dtype: dtype of the optimizer's moments.
        reserved_bytes: what else will be in the device's memory.

    Returns:
        The rows; whether layers have to be computed again, as one row may not fit without; and
        whether the rows are the saved run's.
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
    rows = fitting or 1
    usual_fits = usual and estimate.total(usual) <= memory * (1 - RESERVED_SHARE)
    if usual and usual_fits and per_step % usual == 0:
        rows = usual
    began_with, keeps = saved_rows(saved.meta) if saved else 0, False
    if saved and began_with and per_step % began_with == 0:
        keeps = (saved.meta.get("hardware") or {}).get("device") == runtime.device_name
    rows = began_with if keeps else min(rows, most or rows)
    # Ranks of unlike cards agree, and all of them ask: one may lack the saved run.
    answers = ranks.gather((rows, recomputes, keeps))
    rows = min(answer[0] for answer in answers)
    recomputes, keeps = (any(answer[i] for answer in answers) for i in (1, 2))
    return rows, recomputes, keeps


def _count_streams(saved: Checkpoint | None) -> int:
    """Return how many streams of data a run began with."""
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
        rows: to begin with, unless fewer fitted an earlier run of this shape.
        reserved_bytes: what else will be in the device's memory, and is claimed meanwhile.

    Returns:
        The rows that fit.

    Raises:
        torch.OutOfMemoryError: not even one does.
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
    """Try two passes; the second time there are gradients already.

    The loss is the one over all positions: a stage's own needs no more memory.
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
    """Train in 8 bits if a forward and a backward pass take less time so.

    Args:
        saved: what a run that is there began with.

    Returns:
        Whether to train in 8 bits, and how many times as fast that is, if it was measured.

    Raises:
        UsageError: the micro-batch is not of a size that the kernels take.
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
