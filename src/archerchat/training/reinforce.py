"""Reinforcement learning: a model that answers gets better at what can be judged (SPEC section 8).

    archerchat rl --model-tag d12 --task GSM8K

On-policy REINFORCE in the GRPO style. Every step asks some questions, lets the engine answer each
many times, with the calculator, and makes answers that are better than their question's average
more likely, the others less. An advantage is a reward less its group's mean; the loss is averaged
over all tokens that the model chose in the step. The same command goes on where the last checkpoint
is, bit for bit, and one that would change the run is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console

from archerchat.artifacts import Home, exclusive, write_json
from archerchat.checkpoint import Checkpoint
from archerchat.inference.loading import load_model
from archerchat.peak_flops import peak_flops
from archerchat.runtime import build_runtime, dtype_name, prepare_process, require_one_rank
from archerchat.training.loop import Loop, Outcome
from archerchat.training.metrics import open_run
from archerchat.training.progress import ProgressLine
from archerchat.training.recipe import Cadence, LoopState
from archerchat.training.reinforce_recipe import ReinforceRecipe
from archerchat.training.reinforce_setup import (
    STAGE,
    ReinforceConfig,
    build_recipe,
    build_tasks,
    check_numbers,
    describe_run,
)
from archerchat.training.resume import changed_circumstances, find_start
from archerchat.training.stopping import explained_memory
from archerchat.training.summary import SUMMARY, conclude, summarize


def reinforce(config: ReinforceConfig, home: Home, console: Console | None = None) -> Outcome:
    """Train until the questions are used up, a signal stops it, or it is found to be done already.

    Raises:
        UsageError: the settings contradict each other, the model, or the run that is there.
        DataError, TokenizerError, CheckpointError: something on disk is missing or broken.
    """
    console = console or Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    check_numbers(config)
    runtime = build_runtime(config.device, config.dtype)
    require_one_rank(runtime, "reinforcement")
    prepare_process(runtime)
    base = load_model(home, runtime, config.source, config.model_tag, config.model_step)
    tag = config.output_tag or base.path.parent.name
    train, test = build_tasks(config, home, console)
    steps = config.num_iterations or max(
        1, config.num_epochs * len(train) // config.examples_per_step
    )
    meta = describe_run(config, base, train, test, steps, runtime)
    directory, run = home.checkpoint_dir(STAGE, tag), config.run or f"{tag}-rl"
    with exclusive(directory):
        start = find_start(directory, meta["identity"], config.resume_from_step, False, ())
        summary = home.run_dir(run) / SUMMARY
        # The summary comes last: without it the final evaluation is still to be done.
        if start is not None and start.step == steps and (result := _recall(summary, steps)):
            console.print(
                f"model {tag!r} is already reinforced: step {steps} is in {directory}; {result}"
            )
            return Outcome(True, math.nan, math.nan, 0.0)
        summary.unlink(missing_ok=True)
        with explained_memory():
            recipe = build_recipe(config, home, tag, base, (train, test), steps, runtime, meta)
        _announce(console, config, recipe)
        return _train(config, home, run, recipe, start, console)


def _train(
    config: ReinforceConfig,
    home: Home,
    run: str,
    recipe: ReinforceRecipe,
    start: Checkpoint | None,
    console: Console,
) -> Outcome:
    """Train from `start`, or from the first model."""
    runtime, steps = recipe.runtime, recipe.num_iterations
    peak = peak_flops(runtime, home.cache_dir)
    state, scaler, resumed_from = LoopState(), None, None
    torch.manual_seed(config.seed)  # what checkpoints hold of the generators
    if start is not None:
        state, scaler = recipe.restore(start, extend=False)
        resumed_from = start.path
        console.print(f"going on from {start.path}")
        if changed := changed_circumstances(start.meta, recipe.meta):
            console.print(f"note: equal but not to the last bit from here: {'; '.join(changed)}")
        start = None  # its tensors are copied: let them go
    cadence = Cadence(
        steps,
        recipe.loader.settings.batches,
        recipe.step_tokens,
        recipe.step_flops,
        config.eval_every,
        config.sample_every,
        config.save_every,
    )
    runtime.reset_peak_memory()
    with (
        recipe.loader,
        open_run(
            home, run, recipe.meta, config.telemetry, group=STAGE, resumed_from=resumed_from
        ) as metrics,
        ProgressLine(console, steps, state.step) as progress,
    ):
        metrics.push_tokenizer(home.tokenizer_dir(recipe.meta["tokenizer"]["name"]))
        recipe.progress = progress
        outcome = Loop(
            recipe, recipe.optimizer, runtime, cadence, state, peak, metrics, progress, scaler
        ).run()
    if outcome.finished:
        figures = summarize(outcome, state, runtime, peak) | dict(recipe.step_metrics())
        write_json(home.run_dir(run) / SUMMARY, figures | recipe.passed)
    conclude(console, outcome, state, steps, runtime, recipe.directory, config.resume_from_step)
    if outcome.finished and recipe.passed:
        console.print(_shown(recipe.passed))
    return outcome


def _announce(console: Console, config: ReinforceConfig, recipe: ReinforceRecipe) -> None:
    """Print what will run, and the choices that were made for the user."""
    base, runtime = recipe.meta["identity"]["base"], recipe.runtime
    settings, task = recipe.loader.settings, recipe.loader.task
    for line in (
        f"model      {base['stage']} {base['tag']}, step {base['step']}",
        f"questions  {len(task):,} of {task.name}; {len(recipe.test):,} of its test to measure on",
        f"training   {recipe.num_iterations:,} steps of {settings.questions_per_step} questions, "
        f"{settings.num_samples} answers each, of up to {settings.max_new_tokens} tokens",
        f"rates      x{config.lr_scale:g} of pretraining's, falling to 0",
        f"device     {runtime.device_name}, {dtype_name(runtime.compute_dtype)} "
        f"({runtime.dtype_reason})",
        f"attention  {recipe.meta['attention']}",
    ):
        console.print(line)


def _shown(passed: Mapping[str, float]) -> str:
    figures = (f"pass@{name.rsplit('_')[-1]} {value:.4f}" for name, value in passed.items())
    return f"on the test: {', '.join(figures)}"


def _recall(summary: Path, steps: int) -> str | None:
    """Return what the summary says of the result; None unless a run of so many steps wrote it."""
    try:
        figures = json.loads(summary.read_text())
        passed = {name: figures[name] for name in figures if name.startswith("val/pass_at_")}
        return _shown(passed) if figures["steps"] == steps else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
