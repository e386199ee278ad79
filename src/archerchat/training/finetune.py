"""Supervised fine-tuning: from a base model to one that answers (SPEC section 7).

    archerchat sft --model-tag d12 --mixture generated

The recipe hands the loop rows of conversations, of which it learns the assistant's part. Sequence
length, batch and rates are the base model's, and its optimizer's moments go on. The run is one
pass over the mixture, or `--num-iterations` steps of it. As in pretraining the same command goes on
where the last checkpoint is, bit for bit, and one that would change the run is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console

from archerchat.checkpoint import Checkpoint
from archerchat.console import build_console
from archerchat.data.conversation_loader import describe_mixture
from archerchat.data.task_files import task_files
from archerchat.distributed import require_one_rank
from archerchat.errors import UsageError, require_positive
from archerchat.files import exclusive
from archerchat.home import Home
from archerchat.inference.loading import LoadedModel, load_model
from archerchat.model.flops import flops_per_token
from archerchat.planning.peak_flops import peak_flops
from archerchat.runtime import Runtime, build_runtime, dtype_name, prepare_process
from archerchat.tasks.base import TaskMixture
from archerchat.training.environment import describe_hardware
from archerchat.training.finetune_recipe import RATE_SCALE, FinetuneRecipe
from archerchat.training.finetune_setup import (
    Inheritance,
    build_model,
    build_optimizer,
    choose_attention,
    describe_base,
    estimate_steps,
    inherit,
    open_loader,
    warm_start,
)
from archerchat.training.finetune_summary import announce, tell_conversations
from archerchat.training.loop import Outcome
from archerchat.training.mixtures import MixtureConfig, build_mixtures
from archerchat.training.recipe import Cadence
from archerchat.training.resume import find_start
from archerchat.training.run import RunRequest, begin_run, run_recipe
from archerchat.training.stopping import explained_memory
from archerchat.training.summary import recall
from archerchat.training.telemetry import TelemetryConfig

STAGE = "sft"


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune a base model on conversations."""

    data: MixtureConfig
    model_tag: str | None = None
    """Name of the base model; by default the one that was saved last."""
    model_step: int | None = None
    """Which of its checkpoints; by default the latest."""
    output_tag: str | None = None
    """Name of the fine-tuned model; by default the base model's."""
    run: str | None = None
    """Name of the run in the metrics; by default the fine-tuned model's, with -sft."""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    device: Literal["cuda", "mps", "cpu"] | None = None
    """Where to train; by default the best there is."""
    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """What to compute in; by default what the device is good at."""
    attention: Literal["sdpa", "matmul", "flex", "flash"] | None = None
    """Attention backend; by default the fastest that works here."""
    compile: bool = True
    """Compile the model and the optimizer; falls back where there is no compiler."""
    document_masking: bool = False
    """Keep the conversations that share a row from seeing each other."""
    device_batch_size: int | None = None
    """Rows in a micro-batch; by default the base model's."""
    total_batch_size: int | None = None
    """Tokens in one optimizer step; by default the base model's."""
    lr_scale: float = RATE_SCALE
    """Factor on the base model's learning rates."""
    warm_start: bool = True
    """Go on with the moments of the base model's optimizer."""
    num_iterations: int | None = None
    """Steps, if fewer than a pass over the mixture takes."""
    eval_every: int | None = 200
    """Measure bits per byte on the validation mixture every so many steps, and at the end."""
    eval_tokens: int = 4_194_304
    """Tokens to measure it on."""
    sample_every: int | None = None
    """Print answers every so many steps; at the end in any case."""
    save_every: int | None = 500
    """Save a checkpoint every so many steps, and at the end."""
    keep_last: int = 2
    """Checkpoints to keep."""
    resume_from_step: int | None = None
    """Go on from this checkpoint; by default from the latest, where there is one."""


def finetune(config: FinetuneConfig, home: Home, console: Console | None = None) -> Outcome:
    """Train until the mixture is used up, a signal stops it, or it is found to be done already.

    Raises:
        UsageError: the settings contradict each other, the base model, or the run that is there.
        DataError, TokenizerError, CheckpointError: something on disk is missing or broken.
    """
    console = console or build_console()
    _check_numbers(config)
    runtime = build_runtime(config.device, config.dtype)
    require_one_rank(runtime, "fine-tuning")
    prepare_process(runtime)
    base = load_model(home, runtime, "base", config.model_tag, config.model_step)
    tag = config.output_tag or base.path.parent.name
    files = task_files(home, config.data.data_dir, notify=console.print)
    train, val = build_mixtures(config.data, files)
    inherited = inherit(
        base, runtime, config.lr_scale, config.device_batch_size, config.total_batch_size
    )
    meta = describe_run(config, base, inherited, train, val, runtime)
    directory, run = home.checkpoint_dir(STAGE, tag), config.run or f"{tag}-sft"
    request = RunRequest(home, run, STAGE, config.telemetry, config.resume_from_step, console)
    with exclusive(directory):
        start = find_start(directory, meta["identity"], config.resume_from_step, False, ())
        if start is not None and start.meta.get("finished"):
            result = recall(request.summary, start.step)
            if result is not None:
                console.print(
                    f"model {tag!r} is already fine-tuned: step {start.step} is in {directory}; "
                    f"{result}"
                )
                return Outcome(finished=True)
        with explained_memory():
            recipe = build_recipe(config, home, tag, base, inherited, (train, val), runtime, meta)
        announce(console, recipe, inherited, train, val)
        return _train(config, recipe, inherited, start, request)


def _train(
    config: FinetuneConfig,
    recipe: FinetuneRecipe,
    inherited: Inheritance,
    start: Checkpoint | None,
    request: RunRequest,
) -> Outcome:
    """Train from `start`, or from the base model."""
    peak = peak_flops(recipe.runtime, request.home.cache_dir)
    beginning = begin_run(recipe, start, config.data.mixture_seed, request.console)
    tokens = inherited.total_batch_tokens
    cadence = Cadence(
        recipe.steps_in_all,
        inherited.grad_accum_steps,
        tokens,
        flops_per_token(recipe.model.config) * tokens,
        config.eval_every,
        config.sample_every,
        config.save_every,
    )
    outcome = run_recipe(recipe, beginning, cadence, peak, request)
    tell_conversations(request.console, recipe)
    return outcome


def build_recipe(
    config: FinetuneConfig,
    home: Home,
    tag: str,
    base: LoadedModel,
    inherited: Inheritance,
    mixtures: tuple[TaskMixture, TaskMixture],
    runtime: Runtime,
    meta: dict[str, Any],
) -> FinetuneRecipe:
    """Build the model from the base's weights, its optimizer and its loaders."""
    backend, reason = choose_attention(
        runtime, config.attention, config.document_masking, config.compile
    )
    model = build_model(base, runtime, backend)
    optimizer = build_optimizer(model, inherited.learning_rates, runtime, config.compile)
    moments = warm_start(optimizer, base) if config.warm_start else "from zero"
    (train, val), rows = mixtures, inherited.device_batch_size
    length, tokenizer = model.config.sequence_length, base.tokenizer
    estimate = estimate_steps(train, tokenizer, length, inherited.total_batch_tokens)
    return FinetuneRecipe(
        runtime=runtime,
        model=model,
        optimizer=optimizer,
        loader=open_loader(train, tokenizer, runtime, rows, length, repeat=True),
        open_validation=lambda: open_loader(val, tokenizer, runtime, rows, length, repeat=False),
        tokenizer=tokenizer,
        eval_steps=max(1, config.eval_tokens // (rows * length)),
        num_iterations=config.num_iterations,
        document_masking=config.document_masking,
        first_estimate=estimate,
        compile=config.compile,
        directory=home.checkpoint_dir(STAGE, tag),
        keep_last=config.keep_last,
        meta=meta | {"attention": f"{backend} ({reason})", "moments": moments},
    )


def describe_run(
    config: FinetuneConfig,
    base: LoadedModel,
    inherited: Inheritance,
    train: TaskMixture,
    val: TaskMixture,
    runtime: Runtime,
) -> dict[str, Any]:
    """Return what every checkpoint and journal says of the run; `identity` decides its weights."""
    given = asdict(config)
    return {
        "stage": STAGE,
        "source": "archerchat sft",
        "model_config": base.meta["model_config"],
        "tokenizer": base.meta["tokenizer"],
        "identity": {
            "base": describe_base(base),
            "tokenizer": base.tokenizer.fingerprint,
            "mixture": describe_mixture(train),
            "dtype": dtype_name(runtime.compute_dtype),
            "device_batch_size": inherited.device_batch_size,
            "total_batch_size": inherited.total_batch_tokens,
            "num_iterations": config.num_iterations,
            "learning_rates": asdict(inherited.learning_rates),
            "warm_start": config.warm_start,
            "document_masking": config.document_masking,
        },
        "config": given | {"data": _as_json(given["data"])},
        "compile": config.compile,
        "validation": describe_mixture(val),
        "hardware": describe_hardware(runtime),
    }


def _as_json(mixture: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mixture's configuration with its paths as text."""
    plain = (str, int, type(None))
    return {
        name: value
        if isinstance(value, plain)
        else [str(path) for path in value]
        if isinstance(value, tuple)
        else str(value)
        for name, value in mixture.items()
    }


def _check_numbers(config: FinetuneConfig) -> None:
    require_positive(
        config,
        *("eval_every", "sample_every", "save_every", "keep_last", "eval_tokens"),
        *("num_iterations", "device_batch_size", "total_batch_size"),
    )
    if not 0 <= config.lr_scale < math.inf:
        raise UsageError(f"--lr-scale is {config.lr_scale}; it must be finite and not negative")
