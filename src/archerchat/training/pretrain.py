"""Pretraining: from text shards and a tokenizer to a base model.

    archerchat pretrain --depth 12

The same command resumes from the last checkpoint, bit for bit. A command that would change the
run is refused unless `--extend` allows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from archerchat.checkpoint import Checkpoint
from archerchat.config import PositiveInt, Seed, StateDtypeName, as_json
from archerchat.data.hub import SOURCES
from archerchat.data.packing import Packing
from archerchat.data.prefetch import Batch, Streams
from archerchat.data.shards import Shard, data_directory, list_shards, split_shards
from archerchat.data.text_loader import TextLoader
from archerchat.data.text_sample import TextSample, measure_text
from archerchat.dial import DialConfig, build_hyperparameters
from archerchat.errors import UsageError
from archerchat.evals.core.bundle import find_bundle, load_bundle
from archerchat.evals.core.evaluate import CoreEvaluation, CoreOptions
from archerchat.home import Home
from archerchat.inference.chat import generate_texts
from archerchat.inference.engine import Engine
from archerchat.inference.loading import build_inference_model
from archerchat.inference.sampling_params import SamplingParams
from archerchat.model.fp8 import MULTIPLE, supports_fp8
from archerchat.optim.schedule import build_schedule
from archerchat.planning.plan import BYTES_PER_TOKEN, EVAL_EVERY, EVAL_TOKENS
from archerchat.runtime import DTYPES, dtype_name
from archerchat.tokenizer.bpe import Tokenizer, find_tokenizer
from archerchat.training.recipe import Evaluation, StepSettings
from archerchat.training.run import run_stage
from archerchat.training.stage import Stage, StageConfig

SAMPLE_PROMPTS = ("The capital of France is", "def main(", "If yesterday was Friday, then tomorrow")
SAMPLE_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig):
    """Train a base model."""

    dial: DialConfig
    data: str = "climbmix"
    """Data source (`archerchat data`) or a directory of Parquet shards. The last shard is for
    validation."""
    tokenizer: str = "default"
    """Name of the tokenizer (`archerchat tokenizer train`)."""
    packing: Packing | Literal["auto"] = "auto"
    """`best-fit` crops documents to fill rows; `concat` keeps all text and splits documents.
    `auto` is best-fit for climbmix, fineweb-edu and text of which it keeps 90 %, else concat."""
    model_tag: str | None = None
    """Name of the model. Defaults to d<depth>."""
    seed: Seed = 42
    """Random seed for the initial weights."""
    fp8: bool = False
    """Multiply the large matrices in 8-bit floats if a test at the start shows that this is faster.
    Needs an NVIDIA card of sm89 or later (Ada, Hopper)."""
    optimizer_state: StateDtypeName = "float32"
    """Dtype of the optimizer's moments; bfloat16 halves their memory."""
    eval_every: PositiveInt | None = EVAL_EVERY
    """Steps between validations (bits per byte); the last step is validated too. `none` never
    validates."""
    eval_tokens: PositiveInt = EVAL_TOKENS
    """Number of tokens per validation."""
    core_metric_every: PositiveInt | None = None
    """Steps between evaluations of CORE on part of each task. Off by default."""
    core_metric_max_per_task: PositiveInt = 500
    """Number of examples per CORE task."""
    core_bundle: str | None = None
    """CORE bundle: a folder, or the address of an archive. Defaults to the reference's, which is
    downloaded once."""
    extend: bool = False
    """Resume even if the number of steps, batch size or schedule changed; prints the effect on the
    learning rate. Also continues a run that was imported with its optimizer state."""


class Pretraining(Stage):
    """Train a base model from fresh weights; measure bits per byte on other text."""

    name, command, done = "base", "pretrain", "trained"

    config: PretrainConfig
    loader: Streams[TextLoader]
    uses_fp8: bool = False
    """Whether training multiplies in 8 bits; decided when the data is opened."""
    fp8_speed: float | None = None
    """Measured speed-up of 8-bit products; None if it was not measured."""

    def decide(self) -> None:
        config, home, dial = self.config, self.home, self.config.dial
        if config.fp8 and not supports_fp8(self.runtime.device):
            needed = f"an NVIDIA card of sm89 or newer, and this is {self.runtime.device}"
            raise UsageError(f"--fp8 needs {needed}: leave it out")
        self.tokenizer = Tokenizer.load(find_tokenizer(home, config.tokenizer))
        self.hp = hp = build_hyperparameters(dial, self.tokenizer.vocab_size)
        self.schedule = build_schedule(dial, hp)
        self.tag = config.model_tag or f"d{dial.depth}"
        self.seed, self.num_iterations, self.extend = config.seed, hp.num_iterations, config.extend
        self.model_config, self.rates = hp.model, hp.learning_rates
        self.total_batch_tokens = hp.total_batch_tokens
        self.state_dtype = DTYPES[config.optimizer_state]
        self.fit_to_device()
        self.files = list_shards(data_directory(config.data, home))
        self.shards, self.validation_shards = split_shards(self.files)
        self.packing, self.packing_reason = self._choose_packing()

    @cached_property
    def text(self) -> TextSample:
        """Measurements of a sample of the training text."""
        return measure_text(self.shards, self.tokenizer, self.sequence_length + 1)

    def _choose_packing(self) -> tuple[Packing, str]:
        """Return the packing and the reason for it; a resumed run keeps its own."""
        if self.config.packing != "auto":
            return self.config.packing, "given"
        saved = self.saved.meta.get("identity", {}) if self.saved else {}
        if "packing" in saved:
            return saved["packing"], "as this run began"
        if self.config.data in SOURCES:
            return "best-fit", "as the reference packs this source"
        return self.text.packing, f"best-fit keeps {self.text.kept:.1%} of the text"

    def _data_name(self) -> str:
        """Return the source's name, which stays valid if the home moves, or an absolute path."""
        directory = data_directory(self.config.data, self.home)
        named = directory.parent == self.home.data_dir("any").parent
        return self.config.data if named else str(directory.resolve())

    def identity(self) -> dict[str, Any]:
        config = self.config
        return {
            "model": asdict(self.model_config),
            "tokenizer": self.tokenizer.fingerprint,
            "packing": self.packing,
            "seed": config.seed,
            "fp8": config.fp8,
            "optimizer_state": config.optimizer_state,
            "device_batch_size": self.rows,
            "total_batch_size": self.total_batch_tokens,
            "learning_rates": asdict(self.rates),
            **asdict(self.schedule),
        }

    def describe(self) -> dict[str, Any]:
        name, fingerprint = self.config.tokenizer, self.tokenizer.fingerprint
        resolved = {"data": self._data_name(), "packing": self.packing}
        return super().describe() | {
            "model_config": asdict(self.model_config),
            "tokenizer": {"name": name, "fingerprint": fingerprint},
            "schedule": asdict(self.schedule),
            "validation": [[p.name, p.stat().st_size] for p in self.validation_shards],
            "fp8": self.uses_fp8,
            "config": as_json(self.config) | resolved,
        }

    def set_weights(self, start: Checkpoint | None) -> None:
        self.model.init_weights(self.config.seed)

    def open_data(self, start: Checkpoint | None) -> None:
        config = self.config
        if config.fp8:
            self.choose_precision(start.meta.get("fp8") if start else None)
        self.loader = self.open_streams(partial(self._open_loader, self.shards), start)
        with Shard(self.validation_shards[0]) as shard:
            self.validation_bytes = shard.text_bytes
        # Not before the first step: the first losses are worth more than waiting for its score.
        tokens = min(config.eval_tokens, self.validation_bytes // BYTES_PER_TOKEN)
        bits = Evaluation(self.validate, config.eval_every, at_start=False, tokens=tokens)
        self.evaluations = [bits]
        if (every := config.core_metric_every) is not None:
            cache, notify = self.home.cache_dir, self.console.print
            find = partial(find_bundle, config.core_bundle, cache, notify=notify)
            bundle = load_bundle(self.ranks.first_alone(find))
            options = CoreOptions(max_per_task=config.core_metric_max_per_task)
            self.core = CoreEvaluation(
                bundle, self.tokenizer, options, self.ranks, keep_prompts=True
            )
            core = Evaluation(self.measure_core, every, "core/seconds", at_start=False, slow=True)
            self.evaluations.append(core)

    def _open_loader(self, shards: list[Path], **place: int) -> TextLoader:
        size = {"batch_size": self.rows, "sequence_length": self.sequence_length, **place}
        packing, extend = self.packing, self.config.extend
        return TextLoader(shards, self.tokenizer, packing=packing, extend=extend, **size)

    def choose_precision(self, saved: bool | None) -> None:
        """Use the precision of a resumed run, `saved`, or the one whose measured pass is faster."""
        model, shape = self.model, (self.rows, self.sequence_length)
        if math.prod(shape) % MULTIPLE:
            raise UsageError(
                f"--fp8 needs micro-batches of a multiple of {MULTIPLE} tokens: choose another "
                "--device-batch-size or --max-seq-len"
            )
        if saved is not None:
            self.uses_fp8 = saved
            model.use_fp8(saved)
            return
        tokens = torch.randint(model.config.vocab_size, shape, device=model.device)

        def work() -> None:
            self.loss(tokens, tokens).backward()  # type: ignore[no-untyped-call]
            self.optimizer.zero_grad()

        plain = self.runtime.median_seconds(work)
        model.use_fp8(True)
        try:
            in_8_bits = self.runtime.median_seconds(work)
        except torch.OutOfMemoryError:
            in_8_bits = math.inf
            self.optimizer.zero_grad()
        plain, in_8_bits = self.ranks.mean(plain, in_8_bits)
        self.uses_fp8, self.fp8_speed = plain > in_8_bits, plain / in_8_bits
        model.use_fp8(self.uses_fp8)

    def step_metrics(self) -> Mapping[str, float]:
        usage = self.loader.first.usage
        return {"data/epochs": usage.epochs, "data/text_share": usage.text_share}

    def settings(self, step: int) -> StepSettings:
        """Read the dial's schedules (SPEC section 3)."""
        at = self.schedule
        rate, momentum = at.lr_multiplier(step), at.muon_momentum(step)
        return StepSettings(rate, momentum, at.muon_weight_decay(step))

    def validate(self) -> Mapping[str, float]:
        """Measure bits per byte of the validation text."""
        sizes, seen_bytes = self.tokenizer.token_bytes, 0

        def seen(batch: Batch) -> float:
            nonlocal seen_bytes
            seen_bytes += int(sizes[batch.targets].sum())
            return seen_bytes / max(1, self.validation_bytes)

        loader = self._open_loader(self.validation_shards)
        return self.measure_bits(loader, self.config.eval_tokens, seen)

    def measure_core(self) -> Mapping[str, float]:
        """Measure CORE on part of each task."""
        model = build_inference_model(self.model)
        result = self.core.run(
            model, on_progress=lambda label, share: self.show_progress(f"CORE, {label}", share)
        )
        low, high = result.interval
        figures = {"core/score": result.core, "core/low": low, "core/high": high}
        return figures | {f"core/task/{task.label}": task.centred for task in result.tasks}

    def sample(self) -> Mapping[str, str]:
        """Continue each prompt greedily."""
        shown = self.config.sample_prompt or SAMPLE_PROMPTS
        bos, encode, room = self.tokenizer.bos_id, self.tokenizer.encode, self.sequence_length - 1
        prompts = [[bos, *encode(prompt)][:room] for prompt in shown]
        params = SamplingParams(SAMPLE_TOKENS, temperature=0, stop_token_ids=(bos,))
        engine = Engine(self.model, max_batch=len(prompts))
        texts = generate_texts(engine, self.tokenizer, prompts, params)
        return {prompt: prompt + text for prompt, text in zip(shown, texts, strict=True)}

    def announce(self) -> Iterator[tuple[str, str]]:
        hp, counts = self.hp, self.hp.parameters
        size = f"depth {hp.model.num_layers}, width {hp.model.model_dim}"
        yield "model", f"{size}, {counts.total:,} parameters ({counts.scaling:,} scaling)"
        yield "training", f"{self.describe_steps(hp.num_iterations)}, {hp.total_flops:.3g} FLOPs"
        if self.config.fp8:
            speed = f"; fp8 ran at {self.fp8_speed:.2f} times its speed" if self.fp8_speed else ""
            dtype = dtype_name(self.runtime.compute_dtype)
            yield "precision", ("fp8 and " if self.uses_fp8 else "") + dtype + speed
        yield "packing", f"{self.packing} ({self.packing_reason})"
        yield "data", f"{self._data_name()}: {self.text.describe(hp.total_tokens, self.packing)}"

    def closing_lines(self, finished: bool) -> list[str]:
        usage = self.loader.first.usage
        line = f"text: {usage.epochs:.2f} passes; {usage.text_share:.1%} of it was in a row"
        return [line] if finished else []


def pretrain(config: PretrainConfig, home: Home, console: Console | None = None) -> bool:
    """Train a base model to its last step, or until a signal; raises as `run_stage` does."""
    return run_stage(Pretraining, config, home, console)
