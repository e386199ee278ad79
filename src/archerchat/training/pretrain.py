"""Pretraining: from text shards and a tokenizer to a base model.

    archerchat pretrain --depth 12

The same command resumes from the last checkpoint, bit for bit. A command that would change the
run is refused unless `--extend` allows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from archerchat.checkpoint import Checkpoint, find_checkpoint, list_checkpoints, load_checkpoint
from archerchat.config import PositiveInt, Seed, StateDtypeName
from archerchat.data.hub import SOURCES
from archerchat.data.packing import Packing
from archerchat.data.shards import count_text_bytes, data_directory, list_shards, split_shards
from archerchat.data.streams import Streams, saved_streams
from archerchat.data.text_loader import TextLoader
from archerchat.data.text_sample import TextSample, measure_text
from archerchat.dial import DialConfig, build_hyperparameters, grad_accum_steps
from archerchat.errors import UsageError
from archerchat.evals.core.bundle import find_bundle
from archerchat.home import Home
from archerchat.inference.chat import generate_texts
from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams
from archerchat.model.fp8 import supports_fp8
from archerchat.model.transformer import Transformer
from archerchat.optim.optimizer import Optimizer, build_groups
from archerchat.optim.schedule import Schedule, build_schedule
from archerchat.planning.memory import fit_micro_batch
from archerchat.planning.plan import EVAL_EVERY, EVAL_TOKENS
from archerchat.runtime import DTYPES, dtype_name
from archerchat.tokenizer.bpe import Tokenizer, find_tokenizer
from archerchat.training.base_metrics import build_bits_metric, build_core_metric
from archerchat.training.fitting import choose_precision, fit_rows, run_with_fewer_rows
from archerchat.training.recipe import Evaluation, Recipe, StepSettings
from archerchat.training.resume import describe_extension, set_aside_later
from archerchat.training.stage import Stage, StageConfig
from archerchat.training.throughput import Outcome

SAMPLE_PROMPTS = ("The capital of France is", "def main(", "If yesterday was Friday, then tomorrow")
SAMPLE_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig):
    """Train a base model."""

    dial: DialConfig
    data: str = "climbmix"
    """Data source (`archerchat data`), or a directory of Parquet shards; the last one is for
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
    device_batch_size: PositiveInt | Literal["auto"] | None = "auto"
    """Rows per micro-batch; gradient accumulation keeps the total batch the same. Defaults to
    `archerchat plan`'s, halved on a GPU until it fits."""
    fp8: bool = False
    """Multiply the blocks' large matrices in 8-bit floats if that turns out faster on this card; it
    needs an NVIDIA card of 2023 or later (sm89)."""
    optimizer_state: StateDtypeName = "float32"
    """Dtype of the optimizer's moments; bfloat16 takes half the memory, for a model that does not
    fit otherwise."""
    eval_every: PositiveInt | None = EVAL_EVERY
    """Steps between measurements of bits per byte on the validation shard, and one at the end;
    `none` for never."""
    eval_tokens: PositiveInt = EVAL_TOKENS
    """Number of validation tokens to measure on."""
    core_metric_every: PositiveInt | None = None
    """Steps between evaluations of CORE on part of each task. Off by default."""
    core_metric_max_per_task: PositiveInt = 500
    """Number of examples per CORE task."""
    core_bundle: str | None = None
    """CORE's bundle: a folder, or an archive's address. Defaults to the reference's bundle, which
    is downloaded."""
    extend: bool = False
    """Resume even if the number of steps, batch size or schedule changed; prints the effect on the
    learning rate. Also continues a run that was imported with its optimizer state."""


@dataclass(kw_only=True)
class PretrainRecipe(Recipe):
    """Train on packed text; measure bits per byte on other text."""

    loader: Streams[TextLoader]
    schedule: Schedule
    total_batch_tokens: int
    prompts: Sequence[str] = SAMPLE_PROMPTS

    def total_steps(self, step: int) -> int:
        return self.schedule.num_iterations

    def step_tokens(self) -> int:
        return self.total_batch_tokens

    def settings(self, step: int) -> StepSettings:
        """Read the dial's schedules (SPEC section 3)."""
        return StepSettings(
            self.schedule.lr_multiplier(step),
            self.schedule.muon_momentum(step),
            self.schedule.muon_weight_decay(step),
        )

    def step_metrics(self) -> Mapping[str, float]:
        """Return how often the text was passed over, and how much of it was in a row."""
        usage = self.loader.first.usage
        return {"data/epochs": usage.epochs, "data/text_share": usage.text_share}

    def sample(self, step: int) -> Mapping[str, str]:
        """Continue each prompt greedily."""
        bos, encode = self.tokenizer.bos_id, self.tokenizer.encode
        room = self.model.config.sequence_length - 1
        prompts = [[bos, *encode(prompt)][:room] for prompt in self.prompts]
        params = SamplingParams(SAMPLE_TOKENS, temperature=0, stop_token_ids=(bos,))
        engine = Engine(self.model, max_batch=len(prompts))
        texts = generate_texts(engine, self.tokenizer, prompts, params)
        return {prompt: prompt + text for prompt, text in zip(self.prompts, texts, strict=True)}


class Pretraining(Stage):
    """Train a base model from fresh weights."""

    name, command, done = "base", "pretrain", "trained"
    fp8_speed: float | None = None
    """How many times as fast 8-bit products turned out; None where that was not measured."""
    evaluates_first = False  # random weights: the first losses are worth more than a long wait

    def __init__(
        self,
        config: PretrainConfig,
        home: Home,
        console: Console | None = None,
        tokenizer: Tokenizer | None = None,
        most_rows: int | None = None,
    ) -> None:
        """Decide everything about the run.

        Args:
            most_rows: bound on the rows per micro-batch, if they are chosen here.
            tokenizer: used instead of the one that the configuration names.
        """
        super().__init__(config, home, console)
        self.config, dial = config, config.dial
        self.tokenizer = tokenizer or Tokenizer.load(find_tokenizer(home, config.tokenizer))
        self.hp = build_hyperparameters(dial, self.tokenizer.vocab_size)
        self.schedule = build_schedule(dial, self.hp)
        self.tag = config.model_tag or f"d{dial.depth}"
        self.recomputes = config.activation_checkpointing
        given = config.device_batch_size
        self.chooses_rows = given in (None, "auto")
        self.rows = given if isinstance(given, int) else self._choose_rows(most_rows)
        self.grad_accum_steps = self._count_micro_batches()
        self.files = list_shards(data_directory(config.data, home))
        self.shards = split_shards(self.files)
        self.backend, reason = self.choose_attention(self.hp.model, self.rows)
        self.run_name = config.run or self.tag
        self.seed, self.num_iterations = config.seed, self.hp.num_iterations
        self.extend = config.extend
        self.packing, self.packing_reason = self._choose_packing()
        self.meta = self.describe(
            asdict(self.hp.model),
            {"name": config.tokenizer, "fingerprint": self.tokenizer.fingerprint},
            self._identity(),
            schedule=asdict(self.schedule),
            validation=[[path.name, path.stat().st_size] for path in self.shards[1]],
            attention=f"{self.backend} ({reason})",
            fp8=False,
        )
        if config.fp8 and not supports_fp8(self.runtime.device):
            raise UsageError(
                f"--fp8 needs an NVIDIA card of sm89 or newer, and this is {self.runtime.device}: "
                "leave it out"
            )
        self.meta["config"] |= {
            "data": self._data_name(),
            "device_batch_size": self.rows,
            "packing": self.packing,
        }

    @cached_property
    def text(self) -> TextSample:
        """What a sample of the training text shows."""
        return measure_text(self.shards[0], self.tokenizer, self.hp.model.sequence_length + 1)

    @cached_property
    def _saved(self) -> Mapping[str, Any]:
        """The identity of the run that is there; empty for a new one."""
        if self.config.overwrite or not list_checkpoints(self.directory):
            return {}
        path = find_checkpoint(self.directory, self.config.resume_from_step)
        identity: dict[str, Any] = load_checkpoint(path, sections=()).meta.get("identity", {})
        return identity

    def _choose_packing(self) -> tuple[Packing, str]:
        """Return the packing and the reason for it; a run that is there keeps its own."""
        if self.config.packing != "auto":
            return self.config.packing, "given"
        if saved := self._saved.get("packing"):
            return saved, "as this run began"
        if self.config.data in SOURCES:
            return "best-fit", "as the reference packs this source"
        return self.text.packing, f"best-fit would keep {self.text.kept:.1%} of the text"

    def _identity(self) -> dict[str, object]:
        config, hp, dial = self.config, self.hp, self.config.dial
        return {
            "model": asdict(hp.model),
            "tokenizer": self.tokenizer.fingerprint,
            "packing": self.packing,
            "seed": config.seed,
            "fp8": config.fp8,
            "optimizer_state": config.optimizer_state,
            "device_batch_size": self.rows,
            "total_batch_size": hp.total_batch_tokens,
            "num_iterations": hp.num_iterations,
            "learning_rates": asdict(hp.learning_rates),
            "weight_decay": hp.weight_decay,
            "warmup_steps": dial.warmup_steps,
            "warmdown_ratio": dial.warmdown_ratio,
            "final_lr_frac": dial.final_lr_frac,
        }

    def _count_micro_batches(self) -> int:
        length = self.hp.model.sequence_length
        return grad_accum_steps(
            self.hp.total_batch_tokens, self.rows, length, self.runtime.world_size
        )

    def _choose_rows(self, most: int | None) -> int:
        """Return the saved run's rows per micro-batch, or of a new one as many as fit; and see
        whether layers have to be computed again."""
        model, runtime, self.rows = self.hp.model, self.runtime, 1
        rows = self._count_micro_batches()
        given = model, runtime.compute_dtype, runtime.device, runtime.world_size
        again, state = self.recomputes, DTYPES[self.config.optimizer_state]
        _, fitting, self.recomputes = fit_micro_batch(
            *given, runtime.total_memory_bytes(), rows, recomputes=again, state_dtype=state
        )
        saved: int = self._saved.get("device_batch_size", 0)
        chosen = saved if saved and rows % saved == 0 else fitting or 1
        # Ranks of unlike cards agree, and all of them ask: one may lack the saved run.
        self.recomputes = self.ranks.any(self.recomputes)[0]
        least: int = min(self.ranks.gather(min(chosen, most or chosen)))
        return least

    def _take_rows(self, recipe: Recipe, rows: int) -> None:
        """Make micro-batches smaller before training starts."""
        self.rows = rows
        self.grad_accum_steps = recipe.grad_accum_steps = self._count_micro_batches()
        for saved in (self.meta["identity"], self.meta["config"]):
            saved["device_batch_size"] = rows
        recipe.loader.close()
        recipe.loader = self._open_streams(None)

    def _data_name(self) -> str:
        """Return the source's name, which stays valid if the home moves, or an absolute path."""
        directory = data_directory(self.config.data, self.home)
        named = directory.parent == self.home.data_dir("any").parent
        return self.config.data if named else str(directory.resolve())

    def build_recipe(self, start: Checkpoint | None) -> PretrainRecipe:
        config, dial, runtime = self.config, self.config.dial, self.runtime
        model = Transformer(self.hp.model, runtime.compute_dtype, self.backend)
        model.init_weights(config.seed)
        model.to(runtime.device).recomputes = self.recomputes
        groups = build_groups(model, self.hp.learning_rates)
        state_dtype, validation = DTYPES[config.optimizer_state], self.shards[1]
        recipe = PretrainRecipe(
            runtime=runtime,
            model=model,
            optimizer=Optimizer(
                model, groups, runtime.compute_dtype, config.compile, self.ranks, state_dtype
            ),
            loader=self._open_streams(start),
            tokenizer=self.tokenizer,
            grad_accum_steps=self.grad_accum_steps,
            compile=config.compile,
            schedule=self.schedule,
            total_batch_tokens=self.hp.total_batch_tokens,
            prompts=config.sample_prompt or SAMPLE_PROMPTS,
        )
        if start is None and self.chooses_rows and runtime.device.type == "cuda":
            rows = fit_rows(recipe, self.rows, self.home.cache_dir, self.console.print)
            if rows < self.rows:
                self._take_rows(recipe, rows)
        if config.fp8:
            saved = start.meta.get("fp8") if start else None
            self.meta["fp8"], self.fp8_speed = choose_precision(recipe, self.rows, saved)
        measure_bits = build_bits_metric(
            recipe,
            lambda: self._open_loader(validation, 0, 1),
            max(1, config.eval_tokens // (self.rows * dial.max_seq_len)),
            count_text_bytes(validation),
        )
        recipe.evaluations = [Evaluation(measure_bits, config.eval_every)]
        if config.core_metric_every is not None:
            given, cache, notify = config.core_bundle, self.home.cache_dir, self.console.print
            bundle = self.ranks.first_alone(lambda: find_bundle(given, cache, notify=notify))
            most = config.core_metric_max_per_task
            measure_core = build_core_metric(recipe, bundle, most, self.ranks)
            recipe.evaluations.append(
                Evaluation(
                    measure_core, config.core_metric_every, "core/seconds", False, saves_first=True
                )
            )
        return recipe

    def _open_streams(self, start: Checkpoint | None) -> Streams[TextLoader]:
        """Open the training text, in as many streams as the run began with ranks."""
        saved = start.state.get("loader") if start else None
        count = saved_streams(saved) if saved else self.ranks.world_size
        open_stream = partial(self._open_loader, self.shards[0])
        return Streams(open_stream, count, self.grad_accum_steps, self.ranks)

    def _open_loader(self, shards: list[Path], stream: int, count: int) -> TextLoader:
        return TextLoader(
            shards,
            self.tokenizer,
            batch_size=self.rows,
            sequence_length=self.config.dial.max_seq_len,
            rank=stream,
            world_size=count,
            packing=self.packing,
            extend=self.config.extend,
        )

    def announce(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        hp = self.hp
        yield (
            "model",
            f"depth {hp.model.num_layers}, width {hp.model.model_dim}, "
            f"{hp.parameters.total:,} parameters ({hp.parameters.scaling:,} scaling)",
        )
        yield (
            "training",
            f"{hp.num_iterations:,} steps of {hp.total_batch_tokens:,} tokens "
            f"({self.grad_accum_steps} x {self.rows} rows of "
            f"{hp.model.sequence_length}), {hp.total_flops:.3g} FLOPs",
        )
        if self.recomputes and not self.config.activation_checkpointing:
            yield "memory", "not one row fits unless the backward pass computes layers again"
        if self.config.fp8:
            speed = f"; fp8 ran at {self.fp8_speed:.2f} times its speed" if self.fp8_speed else ""
            dtype = dtype_name(self.runtime.compute_dtype)
            yield "precision", ("fp8 and " if self.meta["fp8"] else "") + dtype + speed
        yield "packing", f"{self.packing} ({self.packing_reason})"
        yield "data", f"{self._data_name()}: {self.text.describe(hp.total_tokens, self.packing)}"

    def closing_lines(self, recipe: Recipe, finished: bool) -> list[str]:
        """Say how much of the text the model saw, and how often."""
        assert isinstance(recipe, PretrainRecipe)
        usage = recipe.loader.first.usage
        line = f"text: {usage.epochs:.2f} passes; {usage.text_share:.1%} of it was in a row"
        return [line] if finished else []

    def prepare_resume(self, start: Checkpoint) -> list[str]:
        """Say what `--extend` changes, and move later checkpoints out of the run's way."""
        if not self.extend:
            return []
        if "schedule" not in start.meta:
            return ["continuing an imported run: its text begins again with the first shard"]
        before = Schedule(**start.meta["schedule"])
        peaks, new_peaks = start.meta["identity"]["learning_rates"], asdict(self.hp.learning_rates)
        return [
            describe_extension(before, self.schedule, start.step, peaks, new_peaks),
            *(
                f"moved {path.name} of the earlier run to {path.parent}"
                for path in set_aside_later(start.path)
            ),
        ]


def pretrain(config: PretrainConfig, home: Home, console: Console | None = None) -> Outcome:
    """Train a base model until the horizon is reached or a signal stops it.

    Raises:
        UsageError: the settings contradict each other or the run that is there.
        DataError, TokenizerError, CheckpointError: something on disk is missing or broken.
    """
    return run_with_fewer_rows(lambda most: Pretraining(config, home, console, most_rows=most))
