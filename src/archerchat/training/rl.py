"""Reinforcement learning: a model gets better at questions whose answers can be judged (SPEC 8).

    archerchat rl --model-tag d12 --task GSM8K

On-policy REINFORCE in the style of GRPO (https://arxiv.org/abs/2402.03300). In each step the engine
answers each of some questions many times, with the calculator. Answers that are better than the
average for their question become more likely, the others less likely: an advantage is a reward
minus its group's mean, and the loss is averaged over all tokens that the model chose in the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from archerchat.checkpoint import Checkpoint
from archerchat.config import NonNegativeFloat, PositiveInt
from archerchat.errors import DataError, UsageError
from archerchat.evals.chat import evaluate_task, limited
from archerchat.home import Home
from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams
from archerchat.model.flops import flops_per_token
from archerchat.model.loss import IGNORED, weighted_loss
from archerchat.planning.memory import kv_cache_bytes
from archerchat.tasks.base import Task
from archerchat.tasks.conversation import Conversation, user
from archerchat.tasks.hub import TaskFiles
from archerchat.tasks.registry import build_task
from archerchat.training.base_model import TuneConfig, Tuning, inherit
from archerchat.training.recipe import Evaluation, Metric, StepSettings
from archerchat.training.rollouts import RolloutLoader
from archerchat.training.run import run_stage

RATE_SCALE = 0.05
"""Factor on the base model's learning rates."""
MUON_MOMENTUM = 0.95
"""Momentum of every step: SPEC section 8 gives none, and this is where fine-tuning ends."""
SAMPLES = 3
"""Number of test questions whose answers are shown."""
SAMPLING = SamplingParams(max_new_tokens=256, top_k=50, num_samples=16)
IDENTITY_PARAMS = ("num_samples", "max_new_tokens", "temperature", "top_k", "seed")
"""Sampling parameters that every saved identity has; others only if they are not the default."""


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig(TuneConfig):
    """Train a chat model by reinforcement, on a task whose answers can be judged."""

    source: Literal["sft", "base"] = "sft"
    """Stage of the model to start from: sft or base."""
    task: str = "GSM8K"
    """Task to train on: GSM8K, SpellingBee, Arithmetic or SimpleSpelling."""
    data_dir: Path | None = None
    """Folder with the task's files. By default they are downloaded once."""
    examples_per_step: PositiveInt = 16
    """Questions per step."""
    sampling: SamplingParams = SAMPLING
    """How answers are sampled. The answers to one question are compared with each other."""
    rollout_batch_size: PositiveInt = 128
    """Number of answers to generate at a time."""
    num_epochs: PositiveInt = 1
    """Number of times each question is asked."""
    num_iterations: PositiveInt | None = None
    """Number of steps. Defaults to as many as the epochs need."""
    lr_scale: NonNegativeFloat = RATE_SCALE
    """Factor on the base model's learning rates."""
    eval_every: PositiveInt | None = 60
    """Steps between validations (pass@k on the task's test); the last step is validated too. `none`
    never validates."""
    eval_examples: PositiveInt = 400
    """Number of test questions per validation."""
    eval_samples: PositiveInt = 8
    """Answers per test question (k in pass@k)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (samples := self.sampling.num_samples) < 2:
            raise UsageError(
                f"--num-samples is {samples}; it must be at least 2: each answer is compared with "
                "others to the same question"
            )
        if self.sampling.temperature == 0:
            problem = "--temperature is 0; it must be above 0"
            raise UsageError(f"{problem}: identical answers teach nothing")
        self.sampling.refuse_changes("stop", "stop_token_ids", "logprobs")


class Reinforcement(Tuning):
    """Train a chat model on its own answers."""

    name, command, done = "rl", "rl", "reinforced"
    metric = Metric("val/pass_at_1", "pass@1 on the test", higher_is_better=True)

    config: ReinforceConfig
    loader: RolloutLoader

    def decide(self) -> None:
        config = self.config
        self.find_base(config.source)
        # Rows differ in length from step to step; each length would be compiled again.
        self.compile = False
        self.train, self.test = self.ranks.first_alone(self._build_tasks)
        self.seed = config.sampling.seed
        steps = max(1, config.num_epochs * len(self.train) // config.examples_per_step)
        self.num_iterations: int = config.num_iterations or steps
        # Fine-tuning has scaled the rates already; the factor is on pretraining's.
        fine_tuned = float((self.base.meta.get("config") or {}).get("lr_scale") or 1.0)
        self.rates = inherit(self.base, self.model_config, config.lr_scale / fine_tuned)[2]
        if (asked := config.examples_per_step) % (size := self.ranks.world_size):
            problem = f"--examples-per-step is {asked}, which {size} ranks cannot share"
            raise UsageError(f"{problem}: make it a multiple")
        dtype = self.runtime.compute_dtype
        cache_bytes = kv_cache_bytes(self.model_config, dtype, self.sequence_length)
        self.fit_to_device(reserved_bytes=cache_bytes * config.rollout_batch_size)

    def _build_tasks(self) -> tuple[Task, Task]:
        """Return the training questions, and the test questions to validate with."""
        config = self.config
        files = TaskFiles(self.home.cache_dir / "tasks", config.data_dir, notify=self.console.print)
        train, test = (build_task(config.task, split, files) for split in ("train", "test"))
        if train.kind != "generative":
            raise UsageError(
                f"--task {config.task} is answered by choosing a letter, not by writing; use "
                "GSM8K, SpellingBee, Arithmetic or SimpleSpelling"
            )
        if empty := [task for task in (train, test) if not len(task)]:
            raise DataError(f"{empty[0].name} has no question in its {empty[0].split} split")
        train.reward(train[0], "")  # a task for training only says so here
        return train, limited(test, config.eval_examples)

    def count_micro_batches(self, rows: int) -> int:
        answers = self.config.examples_per_step * self.config.sampling.num_samples
        return math.ceil(answers / (self.ranks.world_size * rows))

    def identity(self) -> dict[str, Any]:
        config, default = self.config, asdict(SamplingParams())
        counts = {"questions_per_step": config.examples_per_step, "device_batch_size": self.rows}
        given = asdict(config.sampling).items()
        sampling = {k: v for k, v in given if k in IDENTITY_PARAMS or v != default[k]}
        return {
            "base": {"stage": config.source, **self.describe_base()},
            "tokenizer": self.tokenizer.fingerprint,
            "task": self.train.describe(),
            "rollouts": counts | sampling,
            "rollout_batch_size": config.rollout_batch_size,
            "num_iterations": self.num_iterations,
            "learning_rates": asdict(self.rates),
        }

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"validation": self.test.describe()}

    def open_data(self, start: Checkpoint | None) -> None:
        config, on_cuda = self.config, self.model.device.type == "cuda"
        engine = Engine(self.model, config.rollout_batch_size, compile=on_cuda)
        self.loader = RolloutLoader(
            engine,
            self.tokenizer,
            self.train,
            self.ranks,
            config.sampling,
            questions=config.examples_per_step,
            rows=self.rows,
            batches=self.grad_accum_steps,
        )
        self.evaluations = [Evaluation(self.measure_pass, config.eval_every)]

    def next_micro_batch(self) -> tuple[Tensor, Tensor]:
        if self.loader.rolls_out_next:
            self.show_progress("rolling out")
        batch = next(self.loader)
        self.advantages = torch.from_numpy(batch.advantages).to(self.runtime.device)  # (B,)
        return self.to_device(batch)

    def step_tokens(self) -> int:
        return self.loader.tokens

    def step_flops(self) -> int:
        """Estimate the step's operations: one forward pass for each rollout, and one forward and
        backward pass, three times as much, for those that were trained on."""
        passes = self.loader.tokens + 3 * self.loader.learned_tokens
        return flops_per_token(self.model.config) * passes // 3

    def step_metrics(self) -> Mapping[str, float]:
        return self.loader.metrics

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the micro-batch's share of the step's loss, times the number of micro-batches."""
        # Only tokens that the model chose meet the unembedding, not prompts and tool output.
        trained = targets != IGNORED
        return weighted_loss(
            self.hidden(inputs)[trained],
            self.model.unembedding.weight,
            targets[trained],
            self.model.config.vocab_size,
            self.advantages[:, None].expand_as(targets)[trained],
            self.loader.scale,
        )

    def settings(self, step: int) -> StepSettings:
        return StepSettings(1 - step / self.num_iterations, MUON_MOMENTUM)

    def measure_pass(self) -> Mapping[str, float]:
        """Measure pass@k on the test."""
        engine, tokenizer = self.loader.engine, self.tokenizer
        engine.refresh_weights()
        params = replace(self.config.sampling, num_samples=self.config.eval_samples)

        def report(done: int, total: int) -> None:
            self.show_progress("evaluating", done / total)

        result = evaluate_task(engine, tokenizer, self.test, params, self.ranks, report)
        self.figures = {f"val/pass_at_{k}": value for k, value in result.pass_at.items()}
        return self.figures

    def sample(self) -> Mapping[str, str]:
        """Answer the given questions, or the first of the test, greedily with the calculator."""
        self.loader.engine.refresh_weights()
        own: list[Conversation] = [{"messages": [user(q)]} for q in self.config.sample_prompt]
        questions, limit = own or self.test[:SAMPLES], self.config.sampling.max_new_tokens
        return self.answer_questions(self.loader.engine, questions, limit)

    def announce(self) -> Iterator[tuple[str, str]]:
        config, train, test = self.config, self.train, self.test
        yield "model", f"{config.source} {self.base_tag}, step {self.base.step}"
        used = f"{len(train):,} of {train.name}; {len(test):,} of its test to validate with"
        yield "questions", used
        sampling, count = config.sampling, self.num_iterations
        steps = f"{count:,} step{'s' * (count != 1)}"
        answers = f"{sampling.num_samples} answers each, of up to {sampling.max_new_tokens} tokens"
        batch = f"{self.grad_accum_steps} x {self.rows} rows"
        yield "training", f"{steps} of {config.examples_per_step} questions, {answers} ({batch})"
        yield "rates", f"x{config.lr_scale:g} of pretraining's, falling to 0"

    def describe_result(self, figures: Mapping[str, Any]) -> str:
        start = "val/pass_at_"
        found = {n.removeprefix(start): figures[n] for n in figures if n.startswith(start)}
        passed = ", ".join(f"pass@{k} {value:.4f}" for k, value in found.items())
        return f"on the test: {passed or 'not measured'}"

    def closing_lines(self, finished: bool) -> list[str]:
        return [self.describe_result(self.figures)] if finished and self.figures else []


def reinforce(config: ReinforceConfig, home: Home, console: Console | None = None) -> bool:
    """Train until the questions are used up or a signal stops it, as `run_stage` does."""
    return run_stage(Reinforcement, config, home, console)
