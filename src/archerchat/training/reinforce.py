"""Reinforcement learning: a model that answers gets better at what can be judged (SPEC section 8).

    archerchat rl --model-tag d12 --task GSM8K

On-policy REINFORCE in the GRPO style. Every step asks some questions, lets the engine answer each
many times, with the calculator, and makes answers that are better than their question's average
more likely, the others less. An advantage is a reward less its group's mean; the loss is averaged
over all tokens that the model chose in the step. The same command goes on where the last checkpoint
is, bit for bit, and one that would change the run is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from archerchat.checkpoint import Checkpoint
from archerchat.console import build_console
from archerchat.distributed import require_one_rank
from archerchat.files import exclusive
from archerchat.home import Home
from archerchat.inference.loading import load_model
from archerchat.planning.peak_flops import peak_flops
from archerchat.runtime import build_runtime, dtype_name, prepare_process
from archerchat.training.loop import Outcome
from archerchat.training.recipe import Cadence
from archerchat.training.reinforce_recipe import ReinforceRecipe
from archerchat.training.reinforce_setup import (
    STAGE,
    ReinforceConfig,
    build_recipe,
    build_tasks,
    check_numbers,
    describe_run,
)
from archerchat.training.resume import find_start
from archerchat.training.run import RunRequest, begin_run, run_recipe
from archerchat.training.stopping import explained_memory
from archerchat.training.summary import recall


def reinforce(config: ReinforceConfig, home: Home, console: Console | None = None) -> Outcome:
    """Train until the questions are used up, a signal stops it, or it is found to be done already.

    Raises:
        UsageError: the settings contradict each other, the model, or the run that is there.
        DataError, TokenizerError, CheckpointError: something on disk is missing or broken.
    """
    console = console or build_console()
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
    request = RunRequest(home, run, STAGE, config.telemetry, config.resume_from_step, console)
    with exclusive(directory):
        start = find_start(directory, meta["identity"], config.resume_from_step, False, ())
        # The summary comes last: without it the final evaluation is still to be done.
        result = recall(request.summary, steps, _describe_result)
        if start is not None and start.step == steps and result is not None:
            console.print(
                f"model {tag!r} is already reinforced: step {steps} is in {directory}; {result}"
            )
            return Outcome(finished=True)
        with explained_memory():
            recipe = build_recipe(config, home, tag, base, (train, test), steps, runtime, meta)
        _announce(console, config, recipe)
        return _train(config, recipe, start, request)


def _train(
    config: ReinforceConfig, recipe: ReinforceRecipe, start: Checkpoint | None, request: RunRequest
) -> Outcome:
    """Train from `start`, or from the first model."""
    peak = peak_flops(recipe.runtime, request.home.cache_dir)
    beginning = begin_run(recipe, start, config.seed, request.console)
    cadence = Cadence(
        recipe.num_iterations,
        recipe.loader.settings.batches,
        recipe.step_tokens,
        recipe.step_flops,
        config.eval_every,
        config.sample_every,
        config.save_every,
    )
    outcome = run_recipe(recipe, beginning, cadence, peak, request)
    if outcome.finished and recipe.passed:
        request.console.print(_describe_result(recipe.passed))
    return outcome


def _announce(console: Console, config: ReinforceConfig, recipe: ReinforceRecipe) -> None:
    """Print what will run, and the choices that were made for the user."""
    base, runtime = recipe.meta["identity"]["base"], recipe.runtime
    settings, task = recipe.loader.settings, recipe.loader.task
    for line in (
        f"model      {base['stage']} {base['tag']}, step {base['step']}",
        f"questions  {len(task):,} of {task.name}; {len(recipe.test):,} of its test to measure on",
        f"training   {recipe.num_iterations:,} steps of {settings.questions_per_step} questions, "
        f"{config.num_samples} answers each, of up to {config.max_new_tokens} tokens",
        f"rates      x{config.lr_scale:g} of pretraining's, falling to 0",
        f"device     {runtime.device_name}, {dtype_name(runtime.compute_dtype)} "
        f"({runtime.dtype_reason})",
        f"attention  {recipe.meta['attention']}",
    ):
        console.print(line)


def _describe_result(figures: Mapping[str, Any]) -> str:
    """Say what a finished run's summary has of the test."""
    passed = (
        f"pass@{name.rsplit('_')[-1]} {value:.4f}"
        for name, value in figures.items()
        if name.startswith("val/pass_at_")
    )
    return f"on the test: {', '.join(passed)}"
