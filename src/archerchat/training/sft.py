"""Supervised fine-tuning: from a base model to one that answers (SPEC section 7).

    archerchat sft --model-tag d12 --mixture generated

The model learns the assistant's part of conversations. Sequence length, batch and learning rates
are the base model's, and the optimizer starts from its moments. A run is one pass over the
mixture, `--num-epochs` passes, or `--num-iterations` steps, whichever ends first. The same command
resumes from the last checkpoint, bit for bit; a command that would change the run is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from rich.console import Console
from torch import Tensor

from archerchat.checkpoint import Checkpoint
from archerchat.config import NonNegativeFloat, PositiveInt
from archerchat.data.conversation_loader import (
    ConversationLoader,
    Used,
    describe_mixture,
    render_whole,
)
from archerchat.data.prefetch import Batch
from archerchat.data.streams import Streams, saved_streams
from archerchat.home import Home
from archerchat.inference.engine import Engine
from archerchat.tasks.base import TaskMixture
from archerchat.tasks.conversation import Conversation, user
from archerchat.tasks.hub import TaskFiles
from archerchat.tasks.registry import MixtureConfig, build_mixtures
from archerchat.training.base_model import (
    build_model,
    build_optimizer,
    describe_moments,
    find_base_model,
    inherit,
    load_moments,
)
from archerchat.training.recipe import Evaluation, Recipe, StepSettings, answer_questions
from archerchat.training.stage import Stage, StageConfig
from archerchat.training.throughput import Outcome

RATE_SCALE = 0.8
"""Factor on the base model's learning rates."""
WARMDOWN_START = 0.5
"""Progress at which the learning rate begins to fall, to 0 at the end."""
MOMENTUM_START = 0.85
MOMENTUM_PEAK = 0.95
MOMENTUM_WARMUP_STEPS = 300
SAMPLE_QUESTIONS = ("Who are you?", "How many r are in strawberry?", "What is 12 + 30?")
SAMPLE_TOKENS = 64
ENOUGH_STEPS = 50
"""Steps below which a model hardly changes: a run of fewer is warned of."""
ESTIMATE_FROM = 64
"""Number of conversations that are rendered to estimate the length of a run."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(StageConfig):
    """Fine-tune a base model on conversations."""

    data: MixtureConfig
    model_tag: str | None = None
    """Name of the base model. Defaults to the one that was saved last."""
    model_step: int | None = None
    """Step of the base model's checkpoint. Defaults to the latest."""
    output_tag: str | None = None
    """Name of the fine-tuned model. Defaults to the base model's name."""
    document_masking: bool = False
    """Keep conversations that share a row from attending to each other."""
    device_batch_size: PositiveInt | None = None
    """Rows per micro-batch. Defaults to the base model's. Halve it if you run out of memory."""
    total_batch_size: PositiveInt | None = None
    """Tokens per optimizer step. Defaults to the base model's."""
    lr_scale: NonNegativeFloat = RATE_SCALE
    """Factor on the base model's learning rates."""
    warm_start: bool = True
    """Start from the base model's optimizer state."""
    num_epochs: PositiveInt | None = None
    """Passes over the conversations. Defaults to 1, or to as many as --num-iterations takes."""
    num_iterations: PositiveInt | None = None
    """Number of steps. Defaults to what the passes take."""
    eval_every: PositiveInt | None = 200
    """Steps between measurements of bits per byte on the validation mixture, and one at the end;
    `none` for never."""
    eval_tokens: PositiveInt = 4_194_304
    """Number of validation tokens to measure on."""

    @property
    def passes(self) -> int | None:
        """Passes over the conversations that end the run; None leaves the end to the steps."""
        return self.num_epochs or (None if self.num_iterations else 1)


def lr_multiplier(progress: float) -> float:
    """Return the factor on every group's rate at `progress` from 0 to 1."""
    if progress <= WARMDOWN_START:
        return 1.0
    return max(0.0, (1 - progress) / (1 - WARMDOWN_START))


def muon_momentum(step: int) -> float:
    """Return Muon's momentum at `step`."""
    done = min(1.0, step / MOMENTUM_WARMUP_STEPS)
    return (1 - done) * MOMENTUM_START + done * MOMENTUM_PEAK


@dataclass(kw_only=True)
class FinetuneRecipe(Recipe):
    """Train on passes over a mixture of conversations."""

    loader: Streams[ConversationLoader]
    num_iterations: int | None
    """Maximum number of steps; None leaves the end to the passes."""
    num_epochs: int | None
    """Number of passes; None leaves the end to the steps."""
    document_masking: bool
    """Whether the conversations of a row cannot see each other."""
    total_batch_tokens: int
    first_estimate: int
    """About how many steps the run takes, until its own progress shows it."""
    questions: Sequence[str] = SAMPLE_QUESTIONS

    def total_steps(self, step: int) -> int:
        """Return the run's length as far as it is known after `step` steps; `step` ends it."""
        progress = self.data_progress
        if progress >= 1 or step == self.num_iterations:
            return step
        estimate = math.ceil(step / progress) if step and progress else self.first_estimate
        if self.num_iterations is not None:
            estimate = min(estimate, self.num_iterations)
        return max(estimate, step + 1)

    @property
    def data_progress(self) -> float:
        """Share of the passes that is done; 0 where only steps end the run."""
        return self.used().progress / self.num_epochs if self.num_epochs else 0.0

    def used(self) -> Used:
        """Return what became of the conversations of all ranks, which ask at the same steps."""
        own = [each.used for each in self.loader.own]
        return Used.of([part for parts in self.optimizer.ranks.gather(own) for part in parts])

    def progress_at(self, step: int) -> float:
        """Return how much of the run is done before `step`, from 0 to 1."""
        by_steps = step / self.num_iterations if self.num_iterations else 0.0
        return max(by_steps, self.data_progress)

    def settings(self, step: int) -> StepSettings:
        """Read the schedules at `step`; nothing decays."""
        return StepSettings(lr_multiplier(self.progress_at(step)), muon_momentum(step))

    def step_tokens(self) -> int:
        return self.total_batch_tokens

    def step_metrics(self) -> Mapping[str, float]:
        """Return what became of the conversations so far."""
        used = self.used()
        counts = used.counts
        return {
            "data/conversations": used.consumed,
            "data/progress": used.progress,
            "data/cut": counts.cut,
            "data/dropped": counts.dropped,
            "data/padding_share": counts.padding_share,
            "data/trained_share": counts.trained_share,
        }

    def hidden(self, inputs: Tensor) -> Tensor:
        if not self.document_masking:
            return super().hidden(inputs)
        # Every conversation begins with BOS, and so does every token of padding.
        segments = (inputs == self.tokenizer.bos_id).cumsum(1)
        return self.model.hidden(inputs, self._regions, segments=segments)

    def sample(self, step: int) -> Mapping[str, str]:
        """Answer each question greedily, with the calculator."""
        conversations: list[Conversation] = [{"messages": [user(q)]} for q in self.questions]
        engine = Engine(self.model, len(conversations))
        return answer_questions(engine, self.tokenizer, conversations, SAMPLE_TOKENS)


class Finetuning(Stage):
    """Train a base model on conversations."""

    name, command, done = "sft", "sft", "fine-tuned"

    def __init__(self, config: FinetuneConfig, home: Home, console: Console | None = None) -> None:
        super().__init__(config, home, console)
        self.config = config
        self.base = base = find_base_model(home, "base", config.model_tag, config.model_step)
        files = TaskFiles(home.cache_dir / "tasks", config.data.data_dir, notify=self.console.print)
        self.train, self.validation = self.ranks.first_alone(
            lambda: build_mixtures(config.data, files)
        )
        self.inherited = inherit(
            base, self.runtime, config.lr_scale, config.device_batch_size, config.total_batch_size
        )
        self.backend, reason = self.choose_attention(
            base.config, self.inherited.device_batch_size, config.document_masking
        )
        self.pass_tokens = self._estimate_tokens()
        self.tag = config.output_tag or base.tag
        self.run_name = config.run or f"{self.tag}-sft"
        self.seed, self.num_iterations = config.data.mixture_seed, None
        self.meta = self.describe(
            base.meta["model_config"],
            base.meta["tokenizer"],
            self._identity(),
            validation=describe_mixture(self.validation),
            attention=f"{self.backend} ({reason})",
            moments=describe_moments(base, config.warm_start),
        )

    def _identity(self) -> dict[str, object]:
        config, inherited = self.config, self.inherited
        # Runs from before there were passes have none in their identity: theirs was one.
        passes = {} if config.passes == 1 else {"num_epochs": config.passes}
        return passes | {
            "base": self.base.describe(),
            "tokenizer": self.base.tokenizer.fingerprint,
            "mixture": describe_mixture(self.train),
            "device_batch_size": inherited.device_batch_size,
            "total_batch_size": inherited.total_batch_tokens,
            "num_iterations": config.num_iterations,
            "learning_rates": asdict(inherited.learning_rates),
            "warm_start": config.warm_start,
            "document_masking": config.document_masking,
        }

    def is_finished(self, start: Checkpoint) -> bool:
        return bool(start.meta.get("finished"))

    def build_recipe(self, start: Checkpoint | None) -> FinetuneRecipe:
        config, base, inherited, runtime = self.config, self.base, self.inherited, self.runtime
        model = build_model(base, start, runtime, self.backend)
        model.recomputes = config.activation_checkpointing
        optimizer = build_optimizer(
            model, inherited.learning_rates, runtime, config.compile, self.ranks
        )
        if start is None and config.warm_start:
            load_moments(optimizer, base)
        recipe = FinetuneRecipe(
            runtime=runtime,
            model=model,
            optimizer=optimizer,
            loader=Streams(
                partial(self._open_loader, self.train, True),
                saved_streams(start.state["loader"]) if start else self.ranks.world_size,
                inherited.grad_accum_steps,
                self.ranks,
            ),
            tokenizer=base.tokenizer,
            grad_accum_steps=inherited.grad_accum_steps,
            compile=config.compile,
            num_iterations=config.num_iterations,
            num_epochs=config.passes,
            document_masking=config.document_masking,
            total_batch_tokens=inherited.total_batch_tokens,
            first_estimate=config.num_iterations or self.steps_per_pass * (config.passes or 1),
            questions=config.sample_prompt or SAMPLE_QUESTIONS,
        )
        rows = inherited.device_batch_size * base.config.sequence_length
        eval_steps = max(1, config.eval_tokens // rows)

        def measure_bits(step: int) -> Mapping[str, float]:
            with self._open_loader(self.validation, False, 0, 1) as loader:
                return {"val/bpb": recipe.bits_per_byte(_iter_shown(loader, eval_steps, recipe))}

        recipe.evaluations = [Evaluation(measure_bits, config.eval_every)]
        return recipe

    def _open_loader(
        self, mixture: TaskMixture, repeat: bool, stream: int, count: int
    ) -> ConversationLoader:
        """Open one stream of a mixture."""
        return ConversationLoader(
            mixture,
            self.base.tokenizer,
            batch_size=self.inherited.device_batch_size,
            sequence_length=self.base.config.sequence_length,
            rank=stream,
            world_size=count,
            repeat=repeat,
        )

    @property
    def steps_per_pass(self) -> int:
        """About how many steps a pass takes."""
        return max(1, math.ceil(self.pass_tokens / self.inherited.total_batch_tokens))

    def _estimate_tokens(self) -> float:
        """Return about how many tokens a pass has, from a few of its conversations."""
        base, size = self.base, len(self.train)
        indices = range(0, size, math.ceil(size / ESTIMATE_FROM))
        rows = [render_whole(base.tokenizer, self.train, index)[0] for index in indices]
        lengths = [min(len(row), base.config.sequence_length) for row in rows]
        return sum(lengths) / len(lengths) * size

    def announce(self, recipe: Recipe) -> Iterator[tuple[str, str]]:
        assert isinstance(recipe, FinetuneRecipe)
        inherited, estimate = self.inherited, recipe.first_estimate
        about = "" if self.config.num_iterations else "about "
        yield (
            "base",
            f"{self.base.tag}, step {self.base.step}; optimizer moments {self.meta['moments']}",
        )
        yield "mixture", f"{len(self.train):,} conversations of {_names(self.train)}"
        yield "validation", f"{len(self.validation):,} conversations of {_names(self.validation)}"
        for label, kind in (("found", "found"), ("left out", "left_out")):
            notes = (note for task in self.train.tasks for note in getattr(task, kind))
            yield from ((label, note) for note in dict.fromkeys(notes))
        yield (
            "training",
            f"{about}{estimate:,} steps of "
            f"{inherited.total_batch_tokens:,} tokens ({inherited.grad_accum_steps} x "
            f"{inherited.device_batch_size} rows of {self.base.config.sequence_length})",
        )
        if estimate < ENOUGH_STEPS:
            yield "warning", self._describe_short_run(estimate)

    def _describe_short_run(self, steps: int) -> str:
        """Say how a run of these conversations gets enough steps."""
        inherited, length = self.inherited, self.base.config.sequence_length
        batch, smallest = inherited.total_batch_tokens, inherited.device_batch_size * length
        while self.pass_tokens < ENOUGH_STEPS * batch and batch % (2 * smallest) == 0:
            batch //= 2
        passes = max(1, math.ceil(ENOUGH_STEPS * batch / self.pass_tokens))
        return (
            f"{steps} step(s) are too few to learn from; --num-epochs {passes} "
            f"--total-batch-size {batch} would be about {ENOUGH_STEPS}"
        )

    def closing_lines(self, recipe: Recipe, finished: bool) -> list[str]:
        """Say what became of the conversations."""
        assert isinstance(recipe, FinetuneRecipe)
        used = recipe.used()
        counts, more = used.counts, used.consumed - used.share
        if not counts.targets:
            return []
        part = f"{100 * used.progress:.1f} % of the mixture"
        if more >= 0 and recipe.num_epochs != 1:
            part = f"{used.progress:.1f} passes over the mixture"
        elif more >= 0:
            repeated = f", and {more:,} again to fill the last step" if more else ""
            part = f"all of the mixture{repeated}"
        return [
            f"conversations: {used.consumed:,} used ({part}), {counts.cut:,} truncated to a row, "
            f"{counts.dropped:,} dropped; {100 * counts.padding_share:.1f} % of the positions are "
            f"padding, {100 * counts.trained_share:.1f} % are trained on"
        ]


def finetune(config: FinetuneConfig, home: Home, console: Console | None = None) -> Outcome:
    """Train until the passes or the steps are done, or a signal stops it.

    Raises:
        UsageError: the settings contradict each other, the base model, or the run that is there.
        DataError, TokenizerError, CheckpointError: something on disk is missing or broken.
    """
    return Finetuning(config, home, console).run()


def _iter_shown(loader: ConversationLoader, count: int, recipe: Recipe) -> Iterator[Batch]:
    """Yield this rank's of `count` batches, or of as many as hold the mixture once."""
    ranks = recipe.optimizer.ranks
    for done, batch in zip(range(1, count + 1), loader, strict=False):
        if done % ranks.world_size == ranks.rank:
            yield batch
        recipe.show_progress("evaluating", max(done / count, loader.used.progress))


def _names(mixture: TaskMixture) -> str:
    names = [task.name for task in mixture.tasks]
    counts = {name: names.count(name) for name in names}
    return ", ".join(f"{name} x{n}" if n > 1 else name for name, n in counts.items())
