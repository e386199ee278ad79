"""What a run says of itself: before it starts, when it goes on, and when it is over."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from archerchat.checkpoint import Checkpoint
from archerchat.dial import Hyperparameters
from archerchat.optim.schedule import Schedule
from archerchat.peak_flops import PeakFlops
from archerchat.runtime import Runtime, dtype_name
from archerchat.training.base_recipe import BaseRecipe
from archerchat.training.loop import Outcome
from archerchat.training.recipe import LoopState
from archerchat.training.resume import changed_circumstances, describe_extension, set_aside_later

SUMMARY = "summary.json"
"""In the run's directory; it is there when the run is finished."""


def announce(
    console: Console,
    device_batch_size: int,
    hp: Hyperparameters,
    recipe: BaseRecipe,
    peak: PeakFlops,
    accum: int,
) -> None:
    """Print what will run, and the choices that were made for the user."""
    runtime = recipe.runtime
    lines = (
        f"model      depth {hp.model.num_layers}, width {hp.model.model_dim}, "
        f"{hp.parameters.total:,} parameters ({hp.parameters.scaling:,} scaling)",
        f"training   {hp.num_iterations:,} steps of {hp.total_batch_tokens:,} tokens ({accum} x "
        f"{device_batch_size} rows of {hp.model.sequence_length}), {hp.total_flops:.3g} FLOPs",
        f"device     {runtime.device_name}, {dtype_name(runtime.compute_dtype)} "
        f"({runtime.dtype_reason})",
        f"peak       {peak.flops_per_second / 1e12:.3g} TFLOP/s ({peak.source})",
        f"attention  {recipe.meta['attention']}",
    )
    for line in lines:
        console.print(line)


def summarize(
    outcome: Outcome, state: LoopState, runtime: Runtime, peak: PeakFlops
) -> dict[str, Any]:
    """Return the figures of a finished run, for its `summary.json`."""
    figures = {
        "steps": state.step,
        "tokens": state.tokens,
        "val_bpb_first": state.first_val,
        "val_bpb": state.last_val,
        "val_bpb_best": state.best_val,
        "training_seconds": state.training_seconds,
        "tokens_per_second": outcome.tokens_per_second,
        "mfu": outcome.mfu,
        "peak_flops_per_second": peak.flops_per_second,
        "peak_memory_bytes": runtime.peak_memory_bytes(),
    }
    return {k: v if math.isfinite(v) else None for k, v in figures.items()}


def tell_resume(
    console: Console,
    start: Checkpoint,
    meta: Mapping[str, Any],
    schedule: Schedule,
    hp: Hyperparameters,
    extend: bool,
) -> None:
    """Print where the run goes on, what `--extend` changes, and what keeps it from being exact."""
    console.print(f"going on from {start.path}")
    if extend:
        before, peaks = Schedule(**start.meta["schedule"]), start.meta["identity"]["learning_rates"]
        new_peaks = asdict(hp.learning_rates)
        console.print(describe_extension(before, schedule, start.step, peaks, new_peaks))
        for path in set_aside_later(start.path):
            console.print(f"moved {path.name}, of the run as it was, to {path.parent}")
    if changed := changed_circumstances(start.meta, meta):
        console.print(f"note: equal but not to the last bit from here: {'; '.join(changed)}")


def recall(summary: Path, steps: int) -> str | None:
    """Return what the summary says of the result; None unless a run of so many steps wrote it."""
    try:
        figures = json.loads(summary.read_text())
        result = f"val/bpb {figures['val_bpb_first']:.4f} -> {figures['val_bpb']:.4f}"
        return result if figures["steps"] == steps else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def conclude(
    console: Console,
    outcome: Outcome,
    state: LoopState,
    num_iterations: int,
    runtime: Runtime,
    directory: Path,
    resumed_from: int | None,
) -> None:
    """Print how a run ended.

    Args:
        num_iterations: steps in all, as far as is known.
        resumed_from: the step that the command line named.
    """
    if not outcome.finished:
        where = f"the checkpoint is in {directory}" if state.step else "nothing to save yet"
        console.print(
            f"stopped at step {state.step} of {num_iterations}; {where}. The same command "
            + ("without --resume-from-step " if resumed_from is not None else "")
            + "goes on from there"
        )
        return
    if math.isfinite(outcome.tokens_per_second):
        console.print(
            f"trained {state.tokens:,} tokens in "
            f"{state.training_seconds / 60:.1f} min: {outcome.tokens_per_second:,.0f} tok/s, mfu "
            f"{100 * outcome.mfu:.1f} %, {100 * outcome.data_wait_share:.1f} % of the time waiting "
            f"for data, peak memory {runtime.peak_memory_bytes() / 2**30:.2f} GiB"
        )
    if math.isfinite(state.last_val):
        console.print(
            f"validation bits per byte: {state.first_val:.4f} -> {state.last_val:.4f} "
            f"(best {state.best_val:.4f})"
        )
