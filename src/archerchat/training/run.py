"""Run a stage: start or resume, announce, train, conclude."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from archerchat.checkpoint import Checkpoint, find_checkpoint, list_checkpoints
from archerchat.console import ProgressLine, bytes_text
from archerchat.errors import MemoryExceededError, UsageError
from archerchat.files import exclusive, remove_directory, write_json
from archerchat.home import Home
from archerchat.planning.peak_flops import PeakFlops, peak_flops
from archerchat.runtime import dtype_name, explained_memory
from archerchat.training.fitting import fewer
from archerchat.training.loop import Loop
from archerchat.training.outcome import OVERFITTING, Outcome
from archerchat.training.resume import (
    CheckpointWriter,
    changed_circumstances,
    find_start,
    require_same_run,
)
from archerchat.training.stage import Stage
from archerchat.training.telemetry import open_run


def run_stage(
    kind: Callable[..., Stage], config: Any, home: Home, console: Console | None
) -> Outcome:
    """Run a stage; if memory runs out before its first checkpoint, halve the rows it chose.

    Raises:
        UsageError: the settings contradict each other or the run that is there.
        DataError, TokenizerError, CheckpointError: something on disk is missing or broken.
        MemoryExceededError: and the rows cannot be halved: they were given, there is one only, or
            other ranks would wait for the one that failed.
    """
    most_rows = None
    while True:
        stage = kind(config, home, console, most_rows=most_rows)
        try:
            return _run(stage)
        except MemoryExceededError as error:
            saved, alone = list_checkpoints(stage.directory), stage.ranks.world_size == 1
            if not stage.chooses_rows or saved or stage.rows == 1 or not alone:
                raise
            most_rows = fewer(stage.rows)
            stage.console.print(f"{error}\nstarting again with {most_rows} rows per micro-batch")
        del stage
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _run(stage: Stage) -> Outcome:
    """Train until the last step or a signal; do nothing if the run is finished already."""
    alone = exclusive(stage.directory) if stage.ranks.is_master else nullcontext()
    with stage.joined, alone:
        start = _find_start(stage)
        if start is not None and (result := _find_result(stage, start)) is not None:
            stage.console.print(
                f"model {stage.tag!r} is already {stage.done}: step {start.step} is in "
                f"{stage.directory}; {result}"
            )
            return Outcome(finished=True)
        with explained_memory():
            stage.build(start)
        with closing(stage.loader):
            loop = _build_loop(stage, start)
            outcome = run_loop(stage, loop, None if start is None else start.path)
        # Still among the ranks: some figures are sums over all of them.
        if outcome.finished:
            figures = summarize(stage, loop, outcome)
            if stage.ranks.is_master:
                write_json(stage.summary, figures)
        for line in (
            *_iter_end_lines(stage, loop, outcome),
            *stage.closing_lines(outcome.finished),
        ):
            stage.console.print(line)
    return outcome


def _find_start(stage: Stage) -> Checkpoint | None:
    """Return the checkpoint to resume from, the same on all ranks."""
    asked = stage.config.checkpoint
    stage.__dict__.pop("saved", None)  # read before the directory was locked: look again
    resumes = asked.resume or stage.extend or asked.resume_from_step is not None
    if asked.overwrite and resumes:
        raise UsageError(
            "--overwrite starts over, and --resume, --resume-from-step and --extend do not: give "
            "one or the other"
        )
    if stage.saved is None and (stage.extend or asked.resume_from_step is not None):
        flag = "--extend" if asked.resume_from_step is None else "--resume-from-step"
        raise UsageError(f"no checkpoint in {stage.directory}: leave {flag} out")
    start = find_start(stage.saved, stage.meta, stage.extend, stage.chooses_rows)
    require_same_run(stage.ranks, stage.meta, start.step if start else 0, stage.files)
    return start


def _find_result(stage: Stage, start: Checkpoint) -> str | None:
    """Return a finished run's result; None if the run, or its final evaluation, is not done."""
    if not stage.is_finished(start):
        return None
    try:
        figures = json.loads(stage.summary.read_text())
        return stage.describe_result(figures) if figures["steps"] == start.step else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build_loop(stage: Stage, start: Checkpoint | None) -> Loop:
    """Announce the run, and restore a resumed run's state."""
    config, peak = stage.config, peak_flops(stage.runtime, stage.home.cache_dir)
    for label, text in (*stage.announce(), *_announce_device(stage, peak)):
        stage.console.print(f"{label:<10} {text}")
    every = config.checkpoint.save_every
    loop = Loop(stage, peak, every, config.sample_every, stage.evaluates_first)
    torch.manual_seed(stage.seed)
    if start is not None:
        loop.load_state_dict(start.state)
        start.state.clear()  # copied: it would take its memory until the run ends
        stage.console.print(f"resuming from {start.path}")
        if changed := changed_circumstances(start.meta, stage.meta):
            stage.console.print(
                "note: results will match closely but not bit for bit after this point: "
                + "; ".join(changed)
            )
    if stage.ranks.is_master:
        for line in stage.prepare_resume(start) if start else ():
            stage.console.print(line)
        if config.checkpoint.overwrite:
            for step in list_checkpoints(stage.directory):
                remove_directory(find_checkpoint(stage.directory, step))
        stage.summary.unlink(missing_ok=True)
    return loop


def _announce_device(stage: Stage, peak: PeakFlops) -> Iterator[tuple[str, str]]:
    runtime = stage.runtime
    if stage.recomputes and not stage.config.activation_checkpointing:
        yield "memory", "one row fits only if the backward pass recomputes the layers"
    dtype = dtype_name(runtime.compute_dtype)
    yield "device", f"{runtime.device_name}, {dtype} ({runtime.dtype_reason})"
    yield "peak", f"{peak.flops_per_second / 1e12:.3g} TFLOP/s ({peak.source})"
    yield "attention", stage.meta["attention"]


def run_loop(stage: Stage, loop: Loop, resumed_from: Path | None) -> Outcome:
    """Run the loop and record what it does."""
    config, step = stage.config, loop.state.step
    stage.runtime.reset_peak_memory()
    with (
        open_run(
            stage.home,
            stage.run_name,
            stage.meta,
            config.telemetry,
            group=stage.command,
            resumed_from=resumed_from,
            rank=stage.ranks.rank,
        ) as metrics,
        ProgressLine(stage.console, stage.total_steps(step), step) as progress,
    ):
        tokenizer = stage.home.tokenizer_dir(stage.meta["tokenizer"]["name"])
        if problem := metrics.push_tokenizer(tokenizer):
            progress.note(f"the tokenizer is not pushed: {problem}")
        checkpoints = CheckpointWriter(stage.directory, stage.meta, config.checkpoint.keep_last)
        return loop.run(checkpoints, metrics, progress)


def summarize(stage: Stage, loop: Loop, outcome: Outcome) -> dict[str, Any]:
    """Return a finished run's figures for `summary.json`; None where nothing was measured."""
    state, metric = loop.state, stage.metric
    key = metric.name.replace("/", "_")
    figures = {
        "steps": state.step,
        "tokens": state.tokens,
        f"{key}_first": state.first_val,
        key: state.last_val,
        f"{key}_best": metric.score(state.best_val),
        "overfitting": state.overfitting,
        "training_seconds": state.training_seconds,
        "tokens_per_second": outcome.tokens_per_second,
        "mfu": outcome.mfu,
        "peak_flops_per_second": loop.peak.flops_per_second,
        "peak_memory_bytes": stage.runtime.peak_memory_bytes(),
    }
    known = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return known | dict(stage.final_metrics())


def _iter_end_lines(stage: Stage, loop: Loop, outcome: Outcome) -> Iterator[str]:
    """Yield lines about the end of the run."""
    state, metric, asked = loop.state, stage.metric, stage.config.checkpoint
    if not outcome.finished:
        where = f"the checkpoint is in {stage.directory}" if state.step else "nothing is saved"
        again = "without --overwrite " if asked.overwrite else ""
        again += "without --resume-from-step " if asked.resume_from_step is not None else ""
        yield (
            f"stopped at step {state.step} of {stage.total_steps(state.step)}; {where}. "
            f"Run the same command {again}to resume"
        )
        return
    if math.isfinite(outcome.tokens_per_second):
        yield (
            f"trained on {state.tokens:,} tokens in {state.training_seconds / 60:.1f} min: "
            f"{outcome.tokens_per_second:,.0f} tok/s, mfu {100 * outcome.mfu:.1f} %, "
            f"{100 * outcome.data_wait_share:.1f} % of the time waiting for data, peak memory "
            f"{bytes_text(stage.runtime.peak_memory_bytes())}"
        )
    if math.isfinite(state.last_val):
        yield (
            f"{metric.label}: {state.first_val:.4f} -> {state.last_val:.4f} "
            f"(best {metric.score(state.best_val):.4f})"
        )
    if state.overfitting:
        yield f"warning: {OVERFITTING.format(metric.label)}"
