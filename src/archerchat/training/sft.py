"""Supervised fine-tuning: from a base model to one that answers (SPEC section 7).

    archerchat sft --model-tag d12 --mixture generated

The model learns the assistant's part of conversations. Sequence length, batch and learning rates
are the base model's, and the optimizer starts from its moments. A run is one pass over the
mixture, `--num-epochs` passes, or `--num-iterations` steps, whichever ends first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich.console import Console
from torch import Tensor

from archerchat.checkpoint import Checkpoint, load_checkpoint
from archerchat.config import NonNegativeFloat, PositiveInt
from archerchat.data.conversation_loader import (
    ConversationLoader,
    Used,
    render_whole,
)
from archerchat.data.prefetch import Streams
from archerchat.home import Home
from archerchat.inference.engine import Engine
from archerchat.tasks.base import TaskMixture
from archerchat.tasks.collected import MAX_NAMED, JsonlTask
from archerchat.tasks.conversation import Conversation, user
from archerchat.tasks.hub import TaskFiles
from archerchat.tasks.registry import HELD_BACK, MixtureConfig, build_mixtures
from archerchat.training.base_model import TuneConfig, Tuning, inherit
from archerchat.training.recipe import Evaluation, StepSettings
from archerchat.training.run import run_stage

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
"""Fewest steps after which a model has changed much; a shorter run gets a warning."""
FEW_OWN = 0.01
"""Share of the mixture below which a warning says that the user's own conversations get lost."""
ESTIMATE_FROM = 64
"""Number of conversations that are rendered to estimate the length of a run."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TuneConfig):
    """Fine-tune a base model on conversations."""

    data: MixtureConfig
    """The default is downloaded. For your own data: --mixture none --jsonl FILE."""
    document_masking: bool = False
    """Keep conversations that share a row from attending to each other."""
    total_batch_size: PositiveInt | None = None
    """Tokens per optimizer step. Defaults to the base model's."""
    lr_scale: NonNegativeFloat = RATE_SCALE
    """Factor on the base model's learning rates."""
    warm_start: bool = True
    """Start from the base model's optimizer state."""
    num_epochs: PositiveInt | None = None
    """Passes over the conversations. Defaults to 1, or to as many as --num-iterations needs."""
    num_iterations: PositiveInt | None = None
    """Most steps to take. Defaults to as many as the passes need."""
    eval_every: PositiveInt | None = 200
    """Steps between validations (bits per byte); the last step is validated too. `none` never
    validates."""
    eval_tokens: PositiveInt = 4_194_304
    """Number of tokens per validation."""

    @property
    def passes(self) -> float:
        """Passes over the conversations that end the run; infinite if only the steps end it."""
        return self.num_epochs or (math.inf if self.num_iterations else 1)


def iter_held_back(validation: TaskMixture) -> Iterator[str]:
    """Say which of the user's conversations validate only because nothing else was given."""
    for task in validation.tasks:
        if isinstance(task, JsonlTask) and task.picked is not None:
            size, numbers = len(task.rows), [str(index + 1) for index in sorted(task.picked)]
            listed = ", ".join(numbers[:MAX_NAMED])
            if len(numbers) > MAX_NAMED:
                listed += ", ..."
            few = f"also trained on, because there are fewer than {HELD_BACK}"
            use = few if size < HELD_BACK else "held back from training"
            which = f"{len(numbers)} of the {size} in {task.name} (number {listed})"
            yield f"{which}, {use}; choose others with --val-jsonl"


class Finetuning(Tuning):
    """Train a base model on passes over a mixture of conversations."""

    name, command, done = "sft", "sft", "fine-tuned"

    config: FinetuneConfig
    loader: Streams[ConversationLoader]

    def decide(self) -> None:
        config, cache = self.config, self.home.cache_dir / "tasks"
        self.find_base("base")
        files = TaskFiles(cache, config.data.data_dir, notify=self.console.print)
        build = partial(build_mixtures, config.data, files)
        self.train, self.validation = self.ranks.first_alone(build)
        self.seed, self.num_iterations = config.data.mixture_seed, None
        rows, self.total_batch_tokens, self.rates = inherit(
            self.base, self.model_config, config.lr_scale, config.total_batch_size
        )
        # Micro-batches count alike, however much of each is learned: more rows change the loss.
        usual = self.saved_rows or rows
        self.fit_to_device(usual_rows=usual, document_masking=config.document_masking)
        self.pass_tokens = self._estimate_tokens()

    def identity(self) -> dict[str, Any]:
        config = self.config
        # One pass is not named: the first runs knew no other.
        return ({} if config.passes == 1 else {"num_epochs": config.num_epochs}) | {
            "base": self.describe_base(),
            "tokenizer": self.tokenizer.fingerprint,
            "mixture": self.train.describe(),
            "device_batch_size": self.rows,
            "total_batch_size": self.total_batch_tokens,
            "num_iterations": config.num_iterations,
            "learning_rates": asdict(self.rates),
            "warm_start": config.warm_start,
            "document_masking": config.document_masking,
        }

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"validation": self.validation.describe()}

    def open_data(self, start: Checkpoint | None) -> None:
        if start is None and self.config.warm_start and "optimizer" in self.base.hashes:
            moments = load_checkpoint(self.base.path, sections=("optimizer",)).state["optimizer"]
            self.optimizer.load_state_dict(moments)
        self.loader = self.open_streams(partial(self._open_loader, self.train, True), start)
        self.evaluations = [Evaluation(self.validate, self.config.eval_every)]

    def _open_loader(self, mixture: TaskMixture, repeat: bool, **place: int) -> ConversationLoader:
        size = {"batch_size": self.rows, "sequence_length": self.sequence_length, **place}
        return ConversationLoader(mixture, self.tokenizer, repeat=repeat, **size)

    def used(self) -> Used:
        """Return how the conversations of all ranks were used; every rank calls this."""
        own = [each.used for each in self.loader.own]
        return Used.of([part for parts in self.ranks.gather(own) for part in parts])

    def step_metrics(self) -> Mapping[str, float]:
        used = self.used()
        figures = {"data/conversations": used.consumed, "data/progress": used.progress}
        names = ("cut", "dropped", "padding_share", "trained_share")
        return figures | {f"data/{name}": getattr(used.counts, name) for name in names}

    def hidden(self, inputs: Tensor) -> Tensor:
        if not self.config.document_masking:
            return super().hidden(inputs)
        # Every conversation begins with BOS, and so does every token of padding.
        segments = (inputs == self.tokenizer.bos_id).cumsum(1)
        return self.model.hidden(inputs, self.regions, segments=segments)

    @property
    def data_progress(self) -> float:
        """Share of the passes that is done; 0 if only the number of steps ends the run."""
        passes = self.config.passes
        return 0.0 if math.isinf(passes) else self.used().progress / passes

    @property
    def first_estimate(self) -> int:
        """Estimated number of steps, used until the run's own progress gives a better one."""
        steps = self.pass_tokens * self.config.passes / self.total_batch_tokens
        return self.config.num_iterations or max(1, math.ceil(steps))

    def _estimate_tokens(self) -> float:
        """Estimate the tokens of a pass from a few of its conversations."""
        size = len(self.train)
        indices = range(0, size, math.ceil(size / ESTIMATE_FROM))
        rows = [render_whole(self.tokenizer, self.train, index)[0] for index in indices]
        lengths = [min(len(row), self.sequence_length) for row in rows]
        return sum(lengths) / len(lengths) * size

    def total_steps(self, step: int) -> int:
        """Return the expected number of steps; it is `step` if the run is over by then."""
        progress, most = self.data_progress, self.config.num_iterations
        if progress >= 1 or step == most:
            return step
        estimate = math.ceil(step / progress) if step and progress else self.first_estimate
        return max(estimate if most is None else min(estimate, most), step + 1)

    def progress_at(self, step: int) -> float:
        """Return how much of the run is done before `step`, from 0 to 1."""
        most = self.config.num_iterations
        return max(step / most if most else 0.0, self.data_progress)

    def settings(self, step: int) -> StepSettings:
        left = (1 - self.progress_at(step)) / (1 - WARMDOWN_START)
        warm = min(1.0, step / MOMENTUM_WARMUP_STEPS)
        momentum = (1 - warm) * MOMENTUM_START + warm * MOMENTUM_PEAK
        return StepSettings(min(1.0, max(0.0, left)), momentum)

    def validate(self) -> Mapping[str, float]:
        """Measure bits per byte of the validation mixture."""
        loader = self._open_loader(self.validation, False)
        return self.measure_bits(loader, self.config.eval_tokens, lambda _: loader.used.progress)

    def sample(self) -> Mapping[str, str]:
        """Answer each question greedily, with the calculator."""
        questions = self.config.sample_prompt or SAMPLE_QUESTIONS
        conversations: list[Conversation] = [{"messages": [user(q)]} for q in questions]
        engine = Engine(self.model, len(conversations))
        return self.answer_questions(engine, conversations, SAMPLE_TOKENS)

    def announce(self) -> Iterator[tuple[str, str]]:
        estimate, size, moments = self.first_estimate, len(self.train), "from zero"
        if self.config.warm_start and "optimizer" in self.base.hashes:
            moments = f"from the base model's step {self.base.step}"
        elif self.config.warm_start:
            moments += ": the base checkpoint has no optimizer state"
        yield "base", f"{self.base_tag}, step {self.base.step}; optimizer moments {moments}"
        for label, mixture in (("mixture", self.train), ("validation", self.validation)):
            counts = Counter(task.name for task in mixture.tasks).items()
            names = ", ".join(f"{name} x{n}" if n > 1 else name for name, n in counts)
            yield label, f"{len(mixture):,} conversations of {names}"
        yield from (("validation", text) for text in iter_held_back(self.validation))
        for label in ("found", "left_out"):
            notes = (note for task in self.train.tasks for note in getattr(task, label))
            yield from ((label.replace("_", " "), note) for note in dict.fromkeys(notes))
        files = len(self.config.data.jsonl)
        own = sum(map(len, self.train.tasks[-files:])) if files else 0
        if 0 < own < FEW_OWN * size:
            lost = f"your --jsonl is {own:,} of the {size:,} conversations: hardly any is learned"
            yield "warning", f"{lost}. --mixture none trains on yours alone (docs/conversations.md)"
        about = "" if self.config.num_iterations else "about "
        yield "training", about + self.describe_steps(estimate)
        if estimate < ENOUGH_STEPS:
            batch, smallest = self.total_batch_tokens, self.rows * self.sequence_length
            while self.pass_tokens < ENOUGH_STEPS * batch and batch % (2 * smallest) == 0:
                batch //= 2
            passes = max(1, math.ceil(ENOUGH_STEPS * batch / self.pass_tokens))
            flags = f"--num-epochs {passes} --total-batch-size {batch}"
            few = f"too few steps to learn much; {flags} would take about {ENOUGH_STEPS}"
            yield "warning", few

    def closing_lines(self, finished: bool) -> list[str]:
        used = self.used()
        counts = used.counts
        if not counts.targets:
            return []
        return [
            f"conversations: {used.consumed:,} used ({used.progress:.2f} passes over the mixture), "
            f"{counts.cut:,} truncated to a row, {counts.dropped:,} dropped; "
            f"{100 * counts.padding_share:.1f} % of the positions are padding, "
            f"{100 * counts.trained_share:.1f} % are trained on"
        ]


def finetune(config: FinetuneConfig, home: Home, console: Console | None = None) -> bool:
    """Train until the passes or the steps are done or a signal stops it, as `run_stage` does."""
    return run_stage(Finetuning, config, home, console)
