"""What reinforcement is given and what it is built from: configuration, tasks, model, rollouts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from archerchat.data.task_files import task_files
from archerchat.dial import LearningRates
from archerchat.errors import DataError, UsageError, require_positive, require_seed
from archerchat.evals.chat.evaluate import limited
from archerchat.home import Home
from archerchat.inference.engine import Engine
from archerchat.inference.loading import LoadedModel
from archerchat.inference.sampling_params import SamplingParams
from archerchat.runtime import Runtime, dtype_name
from archerchat.tasks.base import Task
from archerchat.tasks.registry import build_task
from archerchat.training.environment import describe_hardware
from archerchat.training.finetune_setup import (
    build_model,
    build_optimizer,
    choose_attention,
    describe_base,
    inherit,
)
from archerchat.training.reinforce_recipe import RATE_SCALE, ReinforceRecipe
from archerchat.training.rollouts import RolloutLoader, RolloutSettings
from archerchat.training.telemetry import TelemetryConfig

STAGE = "rl"


@dataclass(frozen=True)
class ReinforceConfig:
    """Reinforce a model that answers, on a task that can be judged."""

    model_tag: str | None = None
    """Name of the model to start from; by default the one that was saved last."""
    source: Literal["sft", "base"] = "sft"
    """Which stage of it."""
    model_step: int | None = None
    """Which of its checkpoints; by default the latest."""
    output_tag: str | None = None
    """Name of the reinforced model; by default the first one's."""
    run: str | None = None
    """Name of the run in the metrics; by default the reinforced model's, with -rl."""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    task: str = "GSM8K"
    """What is asked: GSM8K, SpellingBee, Arithmetic or SimpleSpelling."""
    data_dir: Path | None = None
    """Folder with the task's files; by default they are downloaded once."""
    examples_per_step: int = 16
    """Questions in a step."""
    num_samples: int = 16
    """Answers to each question."""
    max_new_tokens: int = 256
    """Tokens of an answer at most."""
    temperature: float = 1.0
    """Of the draws; above 0."""
    top_k: int | None = 50
    """Draw from so many of the most likely tokens; None draws from all."""
    device_batch_size: int = 8
    """Rows in a micro-batch."""
    rollout_batch_size: int = 128
    """Answers that are generated at a time."""
    num_epochs: int = 1
    """How often each question is asked."""
    num_iterations: int | None = None
    """Steps; by default as many as the epochs take."""
    lr_scale: float = RATE_SCALE
    """Factor on the base model's learning rates."""
    seed: int = 42
    """Of the order of questions and of the draws."""
    device: Literal["cuda", "mps", "cpu"] | None = None
    """Where to train; by default the best there is."""
    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """What to compute in; by default what the device is good at."""
    compile: bool = True
    """Compile the optimizer; falls back where there is no compiler."""
    eval_every: int | None = 60
    """Measure pass@k on the task's test every so many steps, and at the end."""
    eval_examples: int = 400
    """Questions to measure it on."""
    eval_samples: int = 8
    """Answers to each of them, k."""
    sample_every: int | None = None
    """Print answers every so many steps; at the end in any case."""
    save_every: int | None = 60
    """Save a checkpoint every so many steps, and at the end."""
    keep_last: int = 2
    """Checkpoints to keep."""
    resume_from_step: int | None = None
    """Go on from this checkpoint; by default from the latest, where there is one."""


def check_numbers(config: ReinforceConfig) -> None:
    """Refuse numbers that make no sense.

    Raises:
        UsageError: one does; the message names it.
    """
    require_positive(
        config,
        *("examples_per_step", "max_new_tokens", "top_k", "device_batch_size", "num_epochs"),
        *("rollout_batch_size", "num_iterations", "eval_every", "eval_examples"),
        *("eval_samples", "sample_every", "save_every", "keep_last"),
    )
    if config.num_samples < 2:
        raise UsageError(
            f"--num-samples is {config.num_samples}; an answer is compared with others to the same "
            "question: it must be at least 2"
        )
    if not 0.001 <= config.temperature <= 100:
        raise UsageError(
            f"--temperature is {config.temperature}; it must be from 0.001 to 100: answers that "
            "are all the same teach nothing"
        )
    if not 0 <= config.lr_scale < math.inf:
        raise UsageError(f"--lr-scale is {config.lr_scale}; it must be finite and not negative")
    require_seed(config.seed)


def build_tasks(config: ReinforceConfig, home: Home, console: Console) -> tuple[Task, Task]:
    """Return what is asked in training, and the part of the test that is measured on.

    Raises:
        UsageError: there is no such task, or its answers cannot be judged.
        DataError: its files are missing or broken, or hold nothing.
    """
    files = task_files(home, config.data_dir, notify=console.print)
    train, test = (build_task(config.task, split, files) for split in ("train", "test"))
    if train.kind != "generative":
        raise UsageError(
            f"--task {config.task}: its answers are letters that are compared, not written; use "
            "GSM8K, SpellingBee, Arithmetic or SimpleSpelling"
        )
    for task in (train, test):
        if not len(task):
            raise DataError(f"{task.name} has no question in its {task.split} split")
    train.reward(train[0], "")  # a task for training only says so here
    return train, limited(test, config.eval_examples)


def build_recipe(
    config: ReinforceConfig,
    home: Home,
    tag: str,
    base: LoadedModel,
    tasks: tuple[Task, Task],
    steps: int,
    runtime: Runtime,
    meta: dict[str, Any],
) -> ReinforceRecipe:
    """Build the model from the first one's weights, its optimizer, engine and rollouts."""
    # Rows differ in length from step to step: compiled regions would be compiled anew each time.
    backend, reason = choose_attention(runtime, None, False, False)
    model = build_model(base, runtime, backend)
    rates = _rates(config, base, runtime)
    engine = Engine(model, config.rollout_batch_size)
    train, test = tasks
    return ReinforceRecipe(
        runtime=runtime,
        model=model,
        optimizer=build_optimizer(model, rates, runtime, config.compile),
        loader=RolloutLoader(engine, base.tokenizer, train, _rollout_settings(config)),
        test=test,
        num_iterations=steps,
        eval_sampling=replace(_sampling(config), num_samples=config.eval_samples),
        tokenizer=base.tokenizer,
        compile=False,
        directory=home.checkpoint_dir(STAGE, tag),
        keep_last=config.keep_last,
        meta=meta | {"attention": f"{backend} ({reason})"},
    )


def describe_run(
    config: ReinforceConfig,
    base: LoadedModel,
    train: Task,
    test: Task,
    steps: int,
    runtime: Runtime,
) -> dict[str, Any]:
    """Return what every checkpoint and journal says of the run; `identity` decides its weights."""
    given = asdict(config)
    return {
        "stage": STAGE,
        "source": "archerchat rl",
        "model_config": base.meta["model_config"],
        "tokenizer": base.meta["tokenizer"],
        "identity": {
            "base": {"stage": config.source} | describe_base(base),
            "tokenizer": base.tokenizer.fingerprint,
            "task": train.describe(),
            "rollouts": _rollout_settings(config).identity(),
            "rollout_batch_size": config.rollout_batch_size,
            "dtype": dtype_name(runtime.compute_dtype),
            "num_iterations": steps,
            "learning_rates": asdict(_rates(config, base, runtime)),
        },
        "config": given | {"data_dir": None if config.data_dir is None else str(config.data_dir)},
        "compile": config.compile,
        "validation": test.describe(),
        "hardware": describe_hardware(runtime),
    }


def _sampling(config: ReinforceConfig) -> SamplingParams:
    return SamplingParams(
        config.max_new_tokens,
        config.temperature,
        config.top_k,
        seed=config.seed,
        num_samples=config.num_samples,
    )


def _rollout_settings(config: ReinforceConfig) -> RolloutSettings:
    return RolloutSettings(config.examples_per_step, _sampling(config), config.device_batch_size)


def _rates(config: ReinforceConfig, base: LoadedModel, runtime: Runtime) -> LearningRates:
    """Return the base model's rates, before fine-tuning scaled them, times the flag."""
    given: Mapping[str, Any] = base.meta.get("config") or {}
    fine_tuned = float(given.get("lr_scale") or 1.0)
    return inherit(base, runtime, config.lr_scale / fine_tuned, None, None).learning_rates
