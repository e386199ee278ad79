"""Run a stage: start or resume, announce, train, conclude."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext, suppress
from typing import Any

import torch
from rich.console import Console

from archerchat.checkpoint import Checkpoint, find_checkpoint, list_checkpoints
from archerchat.console import ProgressLine, bytes_text, duration_text
from archerchat.errors import MemoryExceededError
from archerchat.files import exclusive, remove_directory, write_json
from archerchat.home import Home
from archerchat.model.flops import flops_per_token
from archerchat.planning.gpus import find_gpu
from archerchat.planning.plan import FORWARD_SHARE, assume_mfu
from archerchat.runtime import dtype_name, explained_memory
from archerchat.training.loop import Loop
from archerchat.training.resume import (
    CheckpointWriter,
    changed_circumstances,
    find_start,
    prepare_extension,
)
from archerchat.training.stage import Stage
from archerchat.training.telemetry import open_run

LONG_SECONDS = 3600
"""Estimated time of a run from which people on a CPU are told how to shorten it."""


def run_stage(kind: Callable[..., Stage], config: Any, home: Home, console: Console | None) -> bool:
    """Run a stage until its last step or a signal; return whether it is finished.

    If memory runs out before the first checkpoint, it starts again with half the rows it chose.

    Raises:
        UsageError: the settings contradict each other or the run that is there.
        DataError, TokenizerError, CheckpointError: something on disk is missing or broken.
        MemoryExceededError: and the rows cannot be halved: they were given, there is one only, or
            other ranks would wait for the one that failed.
    """
    is_given, most_rows = isinstance(config.device_batch_size, int), None
    while True:
        stage = kind(config, home, console, most_rows)
        try:
            return _run(stage)
        except MemoryExceededError as error:
            saved, alone = list_checkpoints(stage.directory), stage.ranks.world_size == 1
            if is_given or saved or stage.rows == 1 or not alone:
                raise
            # A divisor, about half, so that a step stays a whole number of micro-batches.
            most_rows = next(n for n in range(stage.rows // 2, 0, -1) if stage.rows % n == 0)
            stage.console.print(f"{error}\nstarting again with {most_rows} rows per micro-batch")
        del stage
        gc.collect()
        torch.cuda.empty_cache()


def _run(stage: Stage) -> bool:
    """Train; do nothing if the run is finished already."""
    alone = exclusive(stage.directory) if stage.ranks.is_master else nullcontext()
    with stage.joined, alone:
        start, echo = find_start(stage), stage.console.print
        if start is not None and (result := _find_result(stage, start)) is not None:
            done = f"model {stage.tag!r} is already {stage.done}"
            echo(f"{done}: step {start.step} is in {stage.directory}; {result}")
            return True
        with explained_memory():
            stage.build(start)
        with closing(stage.loader):
            for label, text in (*stage.announce(), *_announce_device(stage, start)):
                echo(f"{label:<10} {text}")
            loop = _build_loop(stage, start)
            finished = run_loop(stage, loop, start)
        # Still among the ranks: some figures are sums over all of them.
        if finished:
            figures = summarize(stage, loop)
            if stage.ranks.is_master:
                write_json(stage.summary, figures)
        lines = _iter_end_lines(stage, loop) if finished else [_describe_stop(stage, loop)]
        for line in (*lines, *stage.closing_lines(finished)):
            echo(line)
    return finished


def _find_result(stage: Stage, start: Checkpoint) -> str | None:
    """Return a finished run's result; None if the run, or its final evaluation, is not done."""
    ends = stage.num_iterations
    if not (start.meta.get("finished") if ends is None else start.step == ends):
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):
        figures = json.loads(stage.summary.read_text())
        return stage.describe_result(figures) if figures["steps"] == start.step else None
    return None


def _announce_device(stage: Stage, start: Checkpoint | None) -> Iterator[tuple[str, str]]:
    runtime, peak = stage.runtime, stage.peak
    if stage.recomputes and not stage.config.activation_checkpointing:
        yield "memory", "one row fits only if the backward pass recomputes the layers"
    dtype = dtype_name(runtime.compute_dtype)
    yield "device", f"{runtime.device_name}, {dtype} ({runtime.dtype_reason})"
    yield "peak", f"{peak.flops_per_second / 1e12:.3g} TFLOP/s ({peak.source})"
    yield "attention", stage.meta["attention"]
    mfu = assume_mfu(runtime.device.type, find_gpu(runtime.device_name))
    rate = mfu * peak.flops_per_second * runtime.world_size
    if not (seconds := _count_flops(stage, start.step if start else 0) / rate):
        return
    is_cpu, more = runtime.device.type == "cpu", ""
    if stage.compile:
        more = " plus compiling (usually 1 to 3 minutes on a CPU)" if is_cpu else " plus compiling"
    time = f"about {duration_text(seconds)}{more}"
    yield "time", f"{time}, if training reaches {mfu:.0%} of the peak"
    if is_cpu and seconds > LONG_SECONDS:
        smaller = "--num-iterations"
        if stage.name == "base":
            smaller += " or --depth, or begin with `bash runs/quickstart.sh` (10 minutes)"
        yield "hint", f"a CPU is slow for a run of this size: lower {smaller}"


def _count_flops(stage: Stage, done: int) -> float:
    """Count the operations that are left: all steps, and the evaluations whose size is known."""
    left = max(0, stage.total_steps(0) - done)  # the total may be an estimate
    per_token = FORWARD_SHARE * flops_per_token(stage.model_config)
    sizes = [each.tokens * math.ceil(left / each.every) for each in stage.evaluations if each.every]
    return left * stage.step_flops() + per_token * sum(sizes)


def _build_loop(stage: Stage, start: Checkpoint | None) -> Loop:
    """Restore a resumed run's state, and clear away what this run replaces."""
    options, echo = stage.config.checkpoint, stage.console.print
    peak = stage.peak.flops_per_second * stage.runtime.world_size
    loop = Loop(stage, peak, options.save_every, stage.config.sample_every)
    torch.manual_seed(stage.seed)
    if start is not None:
        loop.load_state_dict(start.state)
        start.state.clear()  # copied: it would take its memory until the run ends
        echo(f"resuming from {start.path}")
        if changed := changed_circumstances(start.meta, stage.meta):
            closely = "note: results will match closely but not bit for bit after this point"
            echo(f"{closely}: {'; '.join(changed)}")
    if stage.ranks.is_master:
        for line in prepare_extension(stage, start) if start and stage.extend else ():
            echo(line)
        if options.overwrite:
            for step in list_checkpoints(stage.directory):
                remove_directory(find_checkpoint(stage.directory, step))
        stage.summary.unlink(missing_ok=True)
    return loop


def run_loop(stage: Stage, loop: Loop, start: Checkpoint | None) -> bool:
    """Run the loop and record what it does; return whether it is finished."""
    config, step, home = stage.config, loop.state.step, stage.home
    steps = stage.total_steps(step)
    stage.runtime.reset_peak_memory()
    name, meta, rank = stage.run_name, stage.meta, stage.ranks.rank
    origin = start.path if start else None
    session = open_run(
        home, name, meta, config.telemetry, group=stage.command, resumed_from=origin, rank=rank
    )
    with session as metrics, ProgressLine(stage.console, steps, step) as progress:
        tokenizer = home.tokenizer_dir(meta["tokenizer"]["name"])
        if problem := metrics.push_tokenizer(tokenizer):
            progress.note(f"the tokenizer is not pushed: {problem}")
        checkpoints = CheckpointWriter(stage.directory, meta, config.checkpoint.keep_last)
        return loop.run(checkpoints, metrics, progress)


def summarize(stage: Stage, loop: Loop) -> dict[str, Any]:
    """Return a finished run's figures for `summary.json`; None where nothing was measured."""
    state, metric = loop.state, stage.metric
    figures = {
        "steps": state.step,
        "tokens": state.tokens,
        f"{metric.key}_first": state.first_val,
        metric.key: state.last_val,
        f"{metric.key}_best": metric.score(state.best_val),
        "overfitting": state.overfitting,
        "training_seconds": state.training_seconds,
        "tokens_per_second": loop.speed.tokens_per_second,
        "mfu": loop.speed.mfu,
        "peak_flops_per_second": stage.peak.flops_per_second,
        "peak_memory_bytes": stage.runtime.peak_memory_bytes(),
    }
    known = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return {**known, **stage.step_metrics(), **stage.figures}


def _describe_stop(stage: Stage, loop: Loop) -> str:
    step, asked = loop.state.step, stage.config.checkpoint
    where = f"the checkpoint is in {stage.directory}" if step else "nothing is saved"
    again = "without --overwrite " if asked.overwrite else ""
    again += "without --resume-from-step " if asked.resume_from_step is not None else ""
    stopped = f"stopped at step {step} of {stage.total_steps(step)}; {where}"
    return f"{stopped}. Run the same command {again}to resume"


def _iter_end_lines(stage: Stage, loop: Loop) -> Iterator[str]:
    """Yield lines about a finished run."""
    state, speed, metric = loop.state, loop.speed, stage.metric
    if speed.seconds:
        yield (
            f"trained on {state.tokens:,} tokens in {state.training_seconds / 60:.1f} min; median "
            f"step: {speed.tokens_per_second:,.0f} tok/s, mfu {100 * speed.mfu:.1f} %; "
            f"{100 * speed.data_wait_share:.1f} % of the time waiting for data; peak memory "
            f"{bytes_text(stage.runtime.peak_memory_bytes())}"
        )
    if math.isfinite(state.last_val):
        yield (
            f"{metric.label}: {state.first_val:.4f} -> {state.last_val:.4f} "
            f"(best {metric.score(state.best_val):.4f})"
        )
