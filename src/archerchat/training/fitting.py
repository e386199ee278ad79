"""Fit a run to its device: the attention backend, the micro-batch, 8-bit products.

What is measured is the same on all ranks, and is kept in the home's cache where it costs much.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console

from archerchat.checkpoint import list_checkpoints
from archerchat.distributed import Ranks
from archerchat.errors import MemoryExceededError, UsageError
from archerchat.files import recall, remember
from archerchat.model.attention import Backend, choose_backend, runs_varlen
from archerchat.model.config import ModelConfig
from archerchat.model.fp8 import MULTIPLE
from archerchat.planning.peak_flops import cache_key
from archerchat.planning.window_speed import fastest_for_windows
from archerchat.runtime import Runtime
from archerchat.training.recipe import Recipe
from archerchat.training.throughput import Outcome

ROWS_FILE = "device_batch_size.json"
"""Which micro-batch fitted for which model on which card, in the home's cache."""


class SizedStage(Protocol):
    """A stage with micro-batches, as `run_with_fewer_rows` needs it."""

    rows: int
    chooses_rows: bool
    ranks: Ranks
    console: Console

    @property
    def directory(self) -> Path: ...

    def run(self) -> Outcome: ...


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
    if not runs_varlen(runtime.device, runtime.compute_dtype):
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
    optimizer, path = recipe.optimizer, cache_dir / ROWS_FILE
    what = {
        **asdict(model.config),
        "backend": model.backend,
        "compile": recipe.compile,
        "recomputes": model.recomputes,
        "state": str(optimizer.state_dtype),
        "ranks": ranks.world_size,
        "memory": runtime.total_memory_bytes(),
    }
    key = f"{cache_key(runtime)} | {json.dumps(what)}"
    known = recall(path).get(key)
    usable = isinstance(known, int) and 0 < known < rows
    rows = min(ranks.gather(known if usable else rows))
    if usable:
        notify(f"{rows} rows per micro-batch fitted before; to try more, delete {path}")
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


def run_with_fewer_rows(build: Callable[[int | None], SizedStage]) -> Outcome:
    """Run a stage; if memory runs out before its first checkpoint, halve the micro-batch.

    Args:
        build: makes the stage, with at most that many rows per micro-batch if it may choose.

    Raises:
        MemoryExceededError: the micro-batch was given, is of one row, or is shared by ranks, which
            would wait for one that failed.
    """
    most = None
    while True:
        stage = build(most)
        try:
            return stage.run()
        except MemoryExceededError as error:
            saved = list_checkpoints(stage.directory)
            if not stage.chooses_rows or saved or stage.rows == 1 or stage.ranks.world_size > 1:
                raise
            most = stage.rows // 2
            stage.console.print(f"{error}\nstarting again with {most} rows per micro-batch")
        del stage
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
