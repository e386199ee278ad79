"""Pretraining: from text shards and a tokenizer to a base model.

    archerchat pretrain --depth 12

The recipe hands the loop packed batches, the chunked loss and the schedules of the dial. What
decides the weights (`identity`) is saved with every checkpoint: running the same command again
goes on where the last checkpoint is, bit for bit, and a command that would change the run is
refused unless `--extend` asks for it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from archerchat.checkpoint import Checkpoint
from archerchat.console import build_console
from archerchat.data.packing import Packing
from archerchat.data.shards import Shard, data_directory, list_shards, split_shards
from archerchat.data.text_loader import TextLoader
from archerchat.dial import DialConfig, Hyperparameters, build_hyperparameters, grad_accum_steps
from archerchat.distributed import require_one_rank
from archerchat.errors import UsageError, require_positive, require_seed
from archerchat.evals.core.bundle import load_bundle
from archerchat.evals.core.download import find_bundle
from archerchat.files import exclusive
from archerchat.home import Home
from archerchat.model.attention import choose_backend
from archerchat.model.transformer import Transformer
from archerchat.optim.optimizer import Optimizer, build_groups
from archerchat.optim.schedule import Schedule, build_schedule
from archerchat.planning.peak_flops import PeakFlops, peak_flops
from archerchat.runtime import Runtime, build_runtime, dtype_name, prepare_process
from archerchat.tokenizer.bpe import Tokenizer, find_tokenizer
from archerchat.training.base_recipe import BaseRecipe
from archerchat.training.core_metric import CoreMetric
from archerchat.training.environment import describe_hardware
from archerchat.training.loop import Outcome
from archerchat.training.recipe import Cadence
from archerchat.training.resume import describe_extension, find_start, set_aside_later
from archerchat.training.run import RunRequest, begin_run, run_recipe
from archerchat.training.stopping import explained_memory
from archerchat.training.summary import recall
from archerchat.training.telemetry import TelemetryConfig


@dataclass(frozen=True)
class PretrainConfig:
    """Train a base model."""

    dial: DialConfig
    data: str = "climbmix"
    """Data source (`archerchat data`), or a directory of Parquet shards; the last validates."""
    tokenizer: str = "default"
    """Name of the tokenizer (`archerchat tokenizer train`)."""
    packing: Packing = "best-fit"
    """`best-fit` crops documents to fill rows; `concat` drops nothing and continues them."""
    model_tag: str | None = None
    """Name of the model; by default d<depth>."""
    run: str | None = None
    """Name of the run in the metrics; by default the model's."""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    device: Literal["cuda", "mps", "cpu"] | None = None
    """Where to train; by default the best there is."""
    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """What to compute in; by default what the device is good at."""
    attention: Literal["sdpa", "matmul", "flex", "flash"] | None = None
    """Attention backend; by default the fastest that works here."""
    compile: bool = True
    """Compile the model and the optimizer; falls back where there is no compiler."""
    seed: int = 42
    """Of the initial weights."""
    device_batch_size: int = 32
    """Rows in a micro-batch; lower it when memory runs out: steps then take more of them."""
    eval_every: int | None = 250
    """Measure bits per byte on the validation shard every so many steps, and at the end."""
    eval_tokens: int = 41_943_040
    """Tokens to measure it on."""
    core_metric_every: int | None = None
    """Evaluate CORE on part of each task every so many steps, and at the end; by default never."""
    core_metric_max_per_task: int = 500
    """Examples of each task to evaluate it on."""
    core_bundle: str | None = None
    """CORE's bundle: a folder, or an archive's address; by default the reference's, downloaded."""
    sample_every: int | None = 2000
    """Print samples every so many steps, and at the end."""
    save_every: int | None = 1000
    """Save a checkpoint every so many steps, and at the end."""
    keep_last: int = 2
    """Checkpoints to keep."""
    resume_from_step: int | None = None
    """Go on from this checkpoint; by default from the latest, where there is one."""
    extend: bool = False
    """Go on although horizon, batch or schedule differ, and say what the rate will do."""


def pretrain(config: PretrainConfig, home: Home, console: Console | None = None) -> Outcome:
    """Train until the horizon is reached, a signal stops it, or it is found to be done already.

    Raises:
        UsageError: the settings contradict each other or the run that is there.
        DataError, TokenizerError, CheckpointError: something on disk is missing or broken.
    """
    console = console or build_console()
    runtime = build_runtime(config.device, config.dtype)
    require_one_rank(runtime, "pretraining")
    prepare_process(runtime)
    _check_numbers(config)
    tokenizer = Tokenizer.load(find_tokenizer(home, config.tokenizer))
    hp = build_hyperparameters(config.dial, tokenizer.vocab_size)
    tag = config.model_tag or f"d{config.dial.depth}"
    directory, steps = home.checkpoint_dir("base", tag), hp.num_iterations
    request = RunRequest(
        home, config.run or tag, "pretrain", config.telemetry, config.resume_from_step, console
    )
    with exclusive(directory):
        meta = describe_run(config, hp, runtime, tokenizer, home)
        start = find_start(directory, meta["identity"], config.resume_from_step, config.extend)
        # The summary comes last: without it the final evaluation is still to be done.
        result = recall(request.summary, steps)
        if start is not None and start.step == steps and result is not None:
            console.print(
                f"model {tag!r} is already trained: step {start.step} of {steps} is in "
                f"{directory}; {result}"
            )
            return Outcome(finished=True)
        return _train(config, hp, runtime, tokenizer, meta, start, request)


def _train(
    config: PretrainConfig,
    hp: Hyperparameters,
    runtime: Runtime,
    tokenizer: Tokenizer,
    meta: dict[str, Any],
    start: Checkpoint | None,
    request: RunRequest,
) -> Outcome:
    """Train from `start`, or from fresh weights."""
    home, console = request.home, request.console
    accum = grad_accum_steps(
        hp.total_batch_tokens, config.device_batch_size, config.dial.max_seq_len, 1
    )
    core = None
    if config.core_metric_every is not None:
        folder = find_bundle(config.core_bundle, home.cache_dir, notify=console.print)
        core = CoreMetric(load_bundle(folder), tokenizer, config.core_metric_max_per_task)
    schedule, peak = build_schedule(config.dial, hp), peak_flops(runtime, home.cache_dir)
    with explained_memory():
        recipe = build_recipe(config, hp, schedule, runtime, tokenizer, home, meta)
    _announce(console, config.device_batch_size, hp, recipe, peak, accum)
    beginning = begin_run(recipe, start, config.seed, console, extend=config.extend)
    if start is not None and config.extend:
        _tell_extension(console, start, schedule, hp)
    cadence = Cadence(
        hp.num_iterations,
        accum,
        hp.total_batch_tokens,
        hp.flops_per_token * hp.total_batch_tokens,
        config.eval_every,
        config.sample_every,
        config.save_every,
        config.core_metric_every,
    )
    return run_recipe(recipe, beginning, cadence, peak, request, core)


def _announce(
    console: Console,
    device_batch_size: int,
    hp: Hyperparameters,
    recipe: BaseRecipe,
    peak: PeakFlops,
    accum: int,
) -> None:
    """Print what will run, and the choices that were made for the user."""
    runtime = recipe.runtime
    for line in (
        f"model      depth {hp.model.num_layers}, width {hp.model.model_dim}, "
        f"{hp.parameters.total:,} parameters ({hp.parameters.scaling:,} scaling)",
        f"training   {hp.num_iterations:,} steps of {hp.total_batch_tokens:,} tokens ({accum} x "
        f"{device_batch_size} rows of {hp.model.sequence_length}), {hp.total_flops:.3g} FLOPs",
        f"device     {runtime.device_name}, {dtype_name(runtime.compute_dtype)} "
        f"({runtime.dtype_reason})",
        f"peak       {peak.flops_per_second / 1e12:.3g} TFLOP/s ({peak.source})",
        f"attention  {recipe.meta['attention']}",
    ):
        console.print(line)


def _tell_extension(
    console: Console, start: Checkpoint, schedule: Schedule, hp: Hyperparameters
) -> None:
    """Print what `--extend` changes, and move what the run as it was saved later out of its way."""
    before, peaks = Schedule(**start.meta["schedule"]), start.meta["identity"]["learning_rates"]
    new_peaks = asdict(hp.learning_rates)
    console.print(describe_extension(before, schedule, start.step, peaks, new_peaks))
    for path in set_aside_later(start.path):
        console.print(f"moved {path.name}, of the run as it was, to {path.parent}")


def build_recipe(
    config: PretrainConfig,
    hp: Hyperparameters,
    schedule: Schedule,
    runtime: Runtime,
    tokenizer: Tokenizer,
    home: Home,
    meta: dict[str, Any],
) -> BaseRecipe:
    """Build a freshly initialised model, its optimizer and its loaders."""
    train, val = split_shards(list_shards(data_directory(config.data, home)))
    dial = config.dial
    try:
        backend, reason = choose_backend(runtime.device, runtime.compute_dtype, config.attention)
    except ValueError as error:
        raise UsageError(str(error)) from error
    model = Transformer(hp.model, runtime.compute_dtype, backend)
    model.init_weights(config.seed)
    model.to(runtime.device)
    groups = build_groups(model, hp.learning_rates)

    def open_loader(shards: list[Path]) -> TextLoader:
        return TextLoader(
            shards,
            tokenizer,
            batch_size=config.device_batch_size,
            sequence_length=dial.max_seq_len,
            packing=config.packing,
            extend=config.extend,
        )

    return BaseRecipe(
        runtime=runtime,
        model=model,
        optimizer=Optimizer(model, groups, runtime.compute_dtype, compile=config.compile),
        schedule=schedule,
        loader=open_loader(train),
        open_validation=lambda: open_loader(val),
        tokenizer=tokenizer,
        eval_steps=max(1, config.eval_tokens // (config.device_batch_size * dial.max_seq_len)),
        validation_bytes=_text_bytes(val),
        compile=config.compile,
        directory=home.checkpoint_dir("base", config.model_tag or f"d{dial.depth}"),
        keep_last=config.keep_last,
        meta=meta | {"attention": f"{backend} ({reason})"},
    )


def _text_bytes(shards: list[Path]) -> int:
    """Return the bytes of text in `shards`."""
    total = 0
    for path in shards:
        with Shard(path) as shard:
            total += shard.text_bytes
    return total


def describe_run(
    config: PretrainConfig,
    hp: Hyperparameters,
    runtime: Runtime,
    tokenizer: Tokenizer,
    home: Home,
) -> dict[str, Any]:
    """Return what every checkpoint and journal says of the run; `identity` decides its weights."""
    dial, directory = config.dial, data_directory(config.data, home)
    _, val = split_shards(list_shards(directory))
    # A name stays valid when the home moves, a path when the working directory does.
    named = directory.parent == home.data_dir("any").parent
    data = config.data if named else str(directory.resolve())
    return {
        "stage": "base",
        "source": "archerchat pretrain",
        "model_config": asdict(hp.model),
        "tokenizer": {"name": config.tokenizer, "fingerprint": tokenizer.fingerprint},
        "schedule": asdict(build_schedule(dial, hp)),
        "identity": {
            "model": asdict(hp.model),
            "tokenizer": tokenizer.fingerprint,
            "packing": config.packing,
            "seed": config.seed,
            "dtype": dtype_name(runtime.compute_dtype),
            "device_batch_size": config.device_batch_size,
            "total_batch_size": hp.total_batch_tokens,
            "num_iterations": hp.num_iterations,
            "learning_rates": asdict(hp.learning_rates),
            "weight_decay": hp.weight_decay,
            "warmup_steps": dial.warmup_steps,
            "warmdown_ratio": dial.warmdown_ratio,
            "final_lr_frac": dial.final_lr_frac,
        },
        "config": asdict(config) | {"data": data},
        "compile": config.compile,
        "validation": [[path.name, path.stat().st_size] for path in val],
        "hardware": describe_hardware(runtime),
    }


def _check_numbers(config: PretrainConfig) -> None:
    require_seed(config.seed)
    require_positive(
        config,
        *("eval_every", "eval_tokens", "core_metric_every", "core_metric_max_per_task"),
        *("sample_every", "save_every", "keep_last"),
    )
