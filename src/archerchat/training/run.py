"""What every recipe does around the loop: begin or go on, record, train, sum up."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from archerchat.checkpoint import Checkpoint
from archerchat.console import ProgressLine
from archerchat.files import write_json
from archerchat.home import Home
from archerchat.planning.peak_flops import PeakFlops
from archerchat.training.core_metric import CoreMetric
from archerchat.training.loop import Loop, Outcome
from archerchat.training.model_recipe import ModelRecipe
from archerchat.training.recipe import Cadence, LoopState
from archerchat.training.summary import SUMMARY, conclude, summarize, tell_resume
from archerchat.training.telemetry import TelemetryConfig, open_run


@dataclass(frozen=True)
class RunRequest:
    """Where a run is recorded, and how it was asked for."""

    home: Home
    name: str
    """Of the run in the metrics."""
    group: str
    """The recipe's, in the metrics."""
    telemetry: TelemetryConfig
    resume_from_step: int | None
    """The checkpoint that the command line named."""
    console: Console

    @property
    def summary(self) -> Path:
        """Where the figures of the finished run are."""
        return self.home.run_dir(self.name) / SUMMARY


@dataclass(frozen=True)
class Beginning:
    """What a run begins with."""

    state: LoopState = field(default_factory=LoopState)
    scaler: Mapping[str, Any] | None = None
    """State of the float16 gradient scaler."""
    checkpoint: Path | None = None
    """What it goes on from."""


def begin_run(
    recipe: ModelRecipe,
    start: Checkpoint | None,
    seed: int,
    console: Console,
    *,
    extend: bool = False,
) -> Beginning:
    """Go on from `start`, whose tensors are let go, or from the recipe as it was built.

    Args:
        seed: of torch's generators, which checkpoints hold.

    Raises:
        CheckpointError: the checkpoint does not fit this run.
    """
    torch.manual_seed(seed)
    if start is None:
        return Beginning()
    state, scaler = recipe.restore(start, extend)
    start.tensors.clear()  # copied: they would take their memory until the run ends
    tell_resume(console, start, recipe.meta)
    return Beginning(state, scaler, start.path)


def run_recipe(
    recipe: ModelRecipe,
    beginning: Beginning,
    cadence: Cadence,
    peak: PeakFlops,
    request: RunRequest,
    core: CoreMetric | None = None,
) -> Outcome:
    """Run the loop, record what it does, and sum up a run that is finished."""
    home, console, state = request.home, request.console, beginning.state
    runtime, tokenizer = recipe.runtime, recipe.meta["tokenizer"]["name"]
    request.summary.unlink(missing_ok=True)
    runtime.reset_peak_memory()
    with (
        closing(recipe.loader),
        open_run(
            home,
            request.name,
            recipe.meta,
            request.telemetry,
            group=request.group,
            resumed_from=beginning.checkpoint,
        ) as metrics,
        ProgressLine(console, cadence.steps_in_all(state.step), state.step) as progress,
    ):
        if problem := metrics.push_tokenizer(home.tokenizer_dir(tokenizer)):
            progress.note(f"the tokenizer is not pushed: {problem}")
        recipe.progress = progress
        outcome = Loop(
            recipe,
            recipe.optimizer,
            runtime,
            cadence,
            state,
            peak,
            metrics,
            progress,
            beginning.scaler,
            core.bind(recipe.model, progress) if core else None,
        ).run()
    if outcome.finished:
        figures = summarize(outcome, state, runtime, peak) | dict(recipe.final_metrics())
        write_json(request.summary, figures)
    steps, resumed = cadence.steps_in_all(state.step), request.resume_from_step
    conclude(console, outcome, state, steps, runtime, recipe.directory, resumed)
    return outcome
