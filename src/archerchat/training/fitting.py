"""Fit a run to its device: the attention backend, the micro-batch, 8-bit products.

All ranks use the same measurements. Slow ones are kept in the home's cache.
"""

from __future__ import annotations

import math

import torch

from archerchat.checkpoint import Checkpoint, load_checkpoint
from archerchat.data.prefetch import saved_streams
from archerchat.errors import UsageError
from archerchat.model.attention import Backend, choose_backend, runs_varlen
from archerchat.model.fp8 import MULTIPLE
from archerchat.planning.memory import RESERVED_SHARE, fit_micro_batch
from archerchat.planning.window_speed import fastest_for_windows
from archerchat.training.resume import saved_rows
from archerchat.training.stage import Stage


def fit_to_device(
    stage: Stage,
    *,
    usual_rows: int | None = None,
    reserved_bytes: int = 0,
    document_masking: bool = False,
) -> None:
    """Choose the rows per micro-batch, whether layers are recomputed, and the attention.

    Args:
        usual_rows: rows to use if they fit; None uses as many as fit.
        reserved_bytes: memory of the device that is needed for other things.
        document_masking: whether attention must keep the conversations of a row apart.

    Raises:
        UsageError: the forced attention cannot run here, or cannot keep conversations apart.
    """
    given, stage.recomputes = stage.config.device_batch_size, stage.config.activation_checkpointing
    if isinstance(given, int):
        stage.rows = given
    else:
        choose_rows(stage, usual_rows, reserved_bytes)
    stage.grad_accum_steps = stage.count_micro_batches(stage.rows)
    stage.backend, stage.backend_reason = choose_attention(stage, document_masking)


def choose_rows(stage: Stage, usual: int | None = None, reserved_bytes: int = 0) -> None:
    """Estimate how many rows per micro-batch fit, and whether layers must be recomputed.

    A resumed run keeps its rows on the kind of device that it was saved on, to be bit-identical.
    """
    runtime, saved, per_step = stage.runtime, stage.saved, stage.count_micro_batches(1)
    memory = max(0, runtime.total_memory_bytes() - reserved_bytes)
    estimate, fitting, recomputes = fit_micro_batch(
        stage.model_config,
        runtime.compute_dtype,
        runtime.device,
        runtime.world_size,
        memory,
        # A step takes whole micro-batches from each stream of data.
        math.gcd(per_step, per_step * runtime.world_size // _count_streams(saved)),
        recomputes=stage.recomputes,
        state_dtype=stage.state_dtype,
    )
    rows, free = fitting or 1, memory * (1 - RESERVED_SHARE)
    if usual and per_step % usual == 0 and estimate.total(usual) <= free:
        rows = usual
    meta = saved.meta if saved else {}
    began_with, device = saved_rows(meta), (meta.get("hardware") or {}).get("device")
    if began_with > 0 and per_step % began_with == 0 and device == runtime.device_name:
        rows = began_with
    rows = min(rows, stage.most_rows or rows)
    # All ranks call this, even if one lacks the saved run or has another card.
    every_rows, every_recomputes = zip(*stage.ranks.gather((rows, recomputes)), strict=True)
    stage.rows, stage.recomputes = min(every_rows), any(every_recomputes)


def _count_streams(saved: Checkpoint | None) -> int:
    if saved is None or "loader" not in saved.hashes:
        return 1
    return saved_streams(load_checkpoint(saved.path, ("loader",)).state["loader"])


def choose_attention(stage: Stage, document_masking: bool = False) -> tuple[Backend, str]:
    """Return the attention backend, and the reason for it; raises as `fit_to_device` does."""
    runtime, model, forced = stage.runtime, stage.model_config, stage.config.attention
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
    whole = min(model.windows) == model.sequence_length
    if stage.compile and (document_masking or whole):
        return backend, reason
    varlen = runs_varlen(runtime.device, runtime.compute_dtype)
    if not stage.compile:  # flex has to be compiled
        return "varlen" if varlen else "sdpa", "not compiled"
    if not varlen:
        return backend, reason
    timed = fastest_for_windows(runtime, model, stage.rows, stage.home.cache_dir)
    first: tuple[Backend, str] = stage.ranks.gather(timed)[0]
    return first


def choose_precision(stage: Stage, saved: bool | None) -> tuple[bool, float | None]:
    """Train in 8 bits if that makes a forward and a backward pass faster.

    Args:
        saved: whether a resumed run trains in 8 bits.

    Returns:
        Whether to train in 8 bits, and the speed-up if it was measured.

    Raises:
        UsageError: the kernels do not take micro-batches of this size.
    """
    model, shape = stage.model, (stage.rows, stage.sequence_length)
    if math.prod(shape) % MULTIPLE:
        raise UsageError(
            f"--fp8 needs micro-batches of a multiple of {MULTIPLE} tokens: choose another "
            "--device-batch-size or --max-seq-len"
        )
    if saved is not None:
        model.use_fp8(saved)
        return saved, None
    tokens = torch.randint(model.config.vocab_size, shape, device=model.device)

    def work() -> None:
        stage.loss(tokens, tokens).backward()  # type: ignore[no-untyped-call]
        stage.optimizer.zero_grad()

    plain = stage.runtime.median_seconds(work)
    model.use_fp8(True)
    try:
        in_8_bits = stage.runtime.median_seconds(work)
    except torch.OutOfMemoryError:
        in_8_bits = math.inf
        stage.optimizer.zero_grad()
    plain, in_8_bits = stage.ranks.mean(plain, in_8_bits)
    model.use_fp8(plain > in_8_bits)
    return plain > in_8_bits, plain / in_8_bits
