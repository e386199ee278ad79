"""What a run of any recipe says of itself when it goes on, and when it is over."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from archerchat.checkpoint import Checkpoint
from archerchat.planning.peak_flops import PeakFlops
from archerchat.runtime import Runtime
from archerchat.training.loop import Outcome
from archerchat.training.recipe import LoopState
from archerchat.training.resume import changed_circumstances

SUMMARY = "summary.json"
"""In the run's directory; it is there when the run is finished."""


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


def tell_resume(console: Console, start: Checkpoint, meta: Mapping[str, Any]) -> None:
    """Print where the run goes on, and what keeps it from being exact."""
    console.print(f"going on from {start.path}")
    if changed := changed_circumstances(start.meta, meta):
        console.print(f"note: equal but not to the last bit from here: {'; '.join(changed)}")


def describe_gain(figures: Mapping[str, Any]) -> str:
    """Say what a finished run's summary has of the validation loss."""
    return f"val/bpb {figures['val_bpb_first']:.4f} -> {figures['val_bpb']:.4f}"


def recall(
    summary: Path, steps: int, describe: Callable[[Mapping[str, Any]], str] = describe_gain
) -> str | None:
    """Return what the summary says of the result; None unless a run of so many steps wrote it."""
    try:
        figures = json.loads(summary.read_text())
        return describe(figures) if figures["steps"] == steps else None
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
