"""Pretraining: from text shards and a tokenizer to a base model.

    archerchat pretrain --depth 12

The same command resumes from the last checkpoint, bit for bit. A command that would change the
run is refused unless `--extend` allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from archerchat.checkpoint import Checkpoint
from archerchat.config import PositiveInt, Seed
from archerchat.data.packing import Packing
from archerchat.data.prefetch import Batch
from archerchat.data.shards import Shard, data_directory, list_shards, split_shards
from archerchat.data.text_loader import TextLoader
from archerchat.dial import DialConfig, build_hyperparameters, grad_accum_steps
from archerchat.evals.core.bundle import find_bundle, load_bundle
from archerchat.evals.core.evaluate import CoreEvaluation, CoreOptions
from archerchat.home import Home
from archerchat.inference.chat import generate_texts
from archerchat.inference.engine import Engine
from archerchat.inference.loading import InferenceModel
from archerchat.inference.sampling_params import SamplingParams
from archerchat.model.transformer import Transformer
from archerchat.optim.optimizer import Optimizer, build_groups
from archerchat.optim.schedule import Schedule, build_schedule
from archerchat.tokenizer.bpe import Tokenizer, find_tokenizer
from archerchat.training.loop import Outcome
from archerchat.training.recipe import Evaluation, Recipe, StepSettings
from archerchat.training.resume import describe_extension, set_aside_later
from archerchat.training.stage import Stage, StageConfig, choose_attention

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
    packing: Packing = "best-fit"
    """`best-fit` crops documents to fill rows; `concat` keeps all text and splits documents."""
    model_tag: str | None = None
    """Name of the model. Defaults to d<depth>."""
    seed: Seed = 42
    """Random seed for the initial weights."""
    device_batch_size: PositiveInt = 32
    """Rows per micro-batch. Halve it if you run out of memory; gradient accumulation keeps the
    total batch the same."""
    eval_every: PositiveInt | None = 250
    """Steps between measurements of bits per byte on the validation shard."""
    eval_tokens: PositiveInt = 41_943_040
    """Number of validation tokens to measure on."""
    core_metric_every: PositiveInt | None = None
    """Steps between evaluations of CORE on part of each task. Off by default."""
    core_metric_max_per_task: PositiveInt = 500
    """Number of examples per CORE task."""
    core_bundle: str | None = None
    """CORE's bundle: a folder, or an archive's address. Defaults to the reference's bundle, which
    is downloaded."""
    sample_every: PositiveInt | None = 2000
    save_every: PositiveInt | None = 1000
    extend: bool = False
    """Resume even if the number of steps, batch size or schedule changed; prints the effect on the
    learning rate."""


@dataclass(kw_only=True)
class PretrainRecipe(Recipe):
    """Train on packed text; measure bits per byte on other text."""

    loader: TextLoader
    schedule: Schedule
    total_batch_tokens: int

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

    def sample(self, step: int) -> Mapping[str, str]:
        """Continue each prompt greedily."""
        bos, encode = self.tokenizer.bos_id, self.tokenizer.encode
        prompts = [[bos, *encode(prompt)] for prompt in SAMPLE_PROMPTS]
        params = SamplingParams(SAMPLE_TOKENS, temperature=0, stop_token_ids=(bos,))
        engine = Engine(self.model, max_batch=len(prompts))
        texts = generate_texts(engine, self.tokenizer, prompts, params)
        return {prompt: prompt + text for prompt, text in zip(SAMPLE_PROMPTS, texts, strict=True)}


class Pretraining(Stage):
    """Train a base model from fresh weights."""

    name, command, done = "base", "pretrain", "trained"

    def __init__(
        self,
        config: PretrainConfig,
        home: Home,
        console: Console | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Decide everything about the run.

        Args:
            tokenizer: used instead of the one that the configuration names.
        """
        super().__init__(config, home, console)
        self.config, dial = config, config.dial
        self.tokenizer = tokenizer or Tokenizer.load(find_tokenizer(home, config.tokenizer))
        self.hp = build_hyperparameters(dial, self.tokenizer.vocab_size)
        self.schedule = build_schedule(dial, self.hp)
        self.grad_accum_steps = grad_accum_steps(
            self.hp.total_batch_tokens,
            config.device_batch_size,
            dial.max_seq_len,
            self.runtime.world_size,
        )
        self.shards = split_shards(list_shards(data_directory(config.data, home)))
        self.backend, reason = choose_attention(self.runtime, config.attention)
        self.tag = config.model_tag or f"d{dial.depth}"
        self.run_name = config.run or self.tag
        self.seed, self.num_iterations = config.seed, self.hp.num_iterations
        self.extend = config.extend
        self.meta = self.describe(
            asdict(self.hp.model),
            {"name": config.tokenizer, "fingerprint": self.tokenizer.fingerprint},
            self._identity(),
            schedule=asdict(self.schedule),
            validation=[[path.name, path.stat().st_size] for path in self.shards[1]],
            attention=f"{self.backend} ({reason})",
        )
        self.meta["config"]["data"] = self._data_name()

    def _identity(self) -> dict[str, object]:
        config, hp, dial = self.config, self.hp, self.config.dial
        return {
            "model": asdict(hp.model),
            "tokenizer": self.tokenizer.fingerprint,
            "packing": config.packing,
            "seed": config.seed,
            "device_batch_size": config.device_batch_size,
            "total_batch_size": hp.total_batch_tokens,
            "num_iterations": hp.num_iterations,
            "learning_rates": asdict(hp.learning_rates),
            "weight_decay": hp.weight_decay,
            "warmup_steps": dial.warmup_steps,
            "warmdown_ratio": dial.warmdown_ratio,
            "final_lr_frac": dial.final_lr_frac,
        }

    def _data_name(self) -> str:
        """Return the source's name, which stays valid if the home moves, or an absolute path."""
        directory = data_directory(self.config.data, self.home)
        named = directory.parent == self.home.data_dir("any").parent
        return self.config.data if named else str(directory.resolve())

    def build_recipe(self, start: Checkpoint | None) -> PretrainRecipe:
        config, dial, runtime = self.config, self.config.dial, self.runtime
        model = Transformer(self.hp.model, runtime.compute_dtype, self.backend)
        model.init_weights(config.seed)
        model.to(runtime.device)
        groups = build_groups(model, self.hp.learning_rates)
        train, validation = self.shards
        recipe = PretrainRecipe(
            runtime=runtime,
            model=model,
            optimizer=Optimizer(model, groups, runtime.compute_dtype, compile=config.compile),
            loader=self._open_loader(train),
            tokenizer=self.tokenizer,
            grad_accum_steps=self.grad_accum_steps,
            compile=config.compile,
            schedule=self.schedule,
            total_batch_tokens=self.hp.total_batch_tokens,
        )
        rows = config.device_batch_size * dial.max_seq_len
        eval_steps, text_bytes = max(1, config.eval_tokens // rows), _text_bytes(validation)

        def measure_bits(step: int) -> Mapping[str, float]:
            with self._open_loader(validation) as loader:
                batches = _iter_once(loader, eval_steps, text_bytes, recipe)
                return {"val/bpb": recipe.bits_per_byte(batches)}

        recipe.evaluations = [Evaluation(measure_bits, config.eval_every)]
        if config.core_metric_every is not None:
            measure_core = self._build_core_metric(recipe)
            recipe.evaluations.append(
                Evaluation(
                    measure_core, config.core_metric_every, "core/seconds", False, saves_first=True
                )
            )
        return recipe

    def _open_loader(self, shards: list[Path]) -> TextLoader:
        return TextLoader(
            shards,
            self.tokenizer,
            batch_size=self.config.device_batch_size,
            sequence_length=self.config.dial.max_seq_len,
            packing=self.config.packing,
            extend=self.config.extend,
        )

    def _build_core_metric(self, recipe: Recipe) -> Callable[[int], Mapping[str, float]]:
        """Return what measures CORE; its prompts are made once and kept."""
        folder = find_bundle(
            self.config.core_bundle, self.home.cache_dir, notify=self.console.print
        )
        options = CoreOptions(max_per_task=self.config.core_metric_max_per_task)
        evaluation = CoreEvaluation(load_bundle(folder), self.tokenizer, options, keep_prompts=True)

        def measure(step: int) -> Mapping[str, float]:
            result = evaluation.run(
                InferenceModel(recipe.model).model,
                on_progress=lambda label, share: recipe.show_progress(f"CORE, {label}", share),
            )
            figures = {
                "core/score": result.core,
                "core/low": result.core - result.half_width,
                "core/high": result.core + result.half_width,
            }
            return figures | {f"core/task/{task.label}": task.centred for task in result.tasks}

        return measure

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
            f"({self.grad_accum_steps} x {self.config.device_batch_size} rows of "
            f"{hp.model.sequence_length}), {hp.total_flops:.3g} FLOPs",
        )

    def prepare_resume(self, start: Checkpoint) -> list[str]:
        """Say what `--extend` changes, and move later checkpoints out of the run's way."""
        if not self.extend:
            return []
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
    return Pretraining(config, home, console).run()


def _iter_once(loader: TextLoader, count: int, text_bytes: int, recipe: Recipe) -> Iterator[Batch]:
    """Yield `count` batches, or as many as hold the validation text once."""
    sizes, seen = recipe.tokenizer.token_bytes, 0
    for done in range(1, count + 1):
        batch = next(loader)
        yield batch
        seen += int(sizes[batch.targets].sum())
        recipe.show_progress("evaluating", max(done / count, seen / text_bytes))
        if seen >= text_bytes:
            return


def _text_bytes(shards: list[Path]) -> int:
    """Return the bytes of text in `shards`."""
    total = 0
    for path in shards:
        with Shard(path) as shard:
            total += shard.text_bytes
    return total
