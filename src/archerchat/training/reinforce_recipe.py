"""Feed the loop when it reinforces: rollouts as batches, their policy gradient (SPEC section 8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from archerchat.evals.chat.evaluate import ChatEvaluator
from archerchat.evals.chat.generative import answer_problems, render_question
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.tools import read_parts
from archerchat.model.flops import flops_per_token
from archerchat.tasks.base import Task
from archerchat.training.model_recipe import ModelRecipe
from archerchat.training.policy_loss import policy_loss
from archerchat.training.recipe import StepSettings
from archerchat.training.rollouts import RolloutBatch, RolloutLoader

RATE_SCALE = 0.05
"""On the base model's rates."""
MUON_MOMENTUM = 0.95
"""Throughout: SPEC section 8 gives none, and this is where fine-tuning ends."""
SAMPLES = 3
"""Questions of the test whose answers are shown."""


def lr_multiplier(step: int, num_iterations: int) -> float:
    """Return the factor on every group's rate: linear from 1 to 0 (SPEC section 8)."""
    return 1 - step / num_iterations


@dataclass(kw_only=True)
class ReinforceRecipe(ModelRecipe):
    """Feed the loop with rollouts, and measure pass@k on the task's test."""

    loader: RolloutLoader
    test: Task
    """What is measured on."""
    num_iterations: int
    eval_sampling: SamplingParams
    _batch: RolloutBatch | None = field(default=None, init=False)
    """The micro-batch that `loss` is asked for."""
    passed: dict[str, float] = field(default_factory=dict, init=False)
    """What the last evaluation found."""

    def next_micro_batch(self) -> tuple[Tensor, Tensor]:
        """Return a micro-batch of rollouts; a step's first one makes them all."""
        if self.loader.rolls_out_next and self.progress is not None:
            self.progress.busy("rolling out")
        self._batch = next(self.loader)
        return self._to_device(self._batch.inputs), self._to_device(self._batch.targets)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the micro-batch's share of the step's loss, times the number of micro-batches."""
        assert self._batch is not None, "the loss is that of the batch taken last"
        advantages = torch.from_numpy(self._batch.advantages).to(self.runtime.device)
        return policy_loss(
            self._hidden(inputs),
            self.model.unembedding.weight,
            targets,
            advantages,
            self.model.config.vocab_size,
            self._batch.scale,
        )

    def settings(self, step: int) -> StepSettings:
        """Read the schedules at `step`; nothing decays."""
        return StepSettings(lr_multiplier(step, self.num_iterations), MUON_MOMENTUM, 0.0)

    def step_metrics(self) -> Mapping[str, float]:
        """Return what the step's rollouts were worth."""
        return self.loader.metrics()

    def final_metrics(self) -> Mapping[str, float]:
        """Return the last step's figures and pass@k."""
        return {**self.step_metrics(), **self.passed}

    def step_tokens(self) -> int:
        """Return the tokens of the step's rollouts, prompts included."""
        return self.loader.amounts()[0]

    def step_flops(self) -> int:
        """Return about how many operations the step took: a pass forward for each rollout, and
        one forward and backward, three times as much, for those that were trained on."""
        rolled_out, trained = self.loader.amounts()
        return flops_per_token(self.model.config) * (rolled_out + 3 * trained) // 3

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Measure pass@k on the test."""
        engine = self.loader.engine
        engine.refresh_weights()
        evaluator = ChatEvaluator(self.model, self.tokenizer, self.eval_sampling, engine=engine)

        def on_progress(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress.busy(f"evaluating: {done / total:.0%}")

        result = evaluator.evaluate(self.test, on_progress=on_progress)
        self.passed = {f"val/pass_at_{k}": value for k, value in result.pass_at.items()}
        return self.passed

    def sample(self, step: int) -> Mapping[str, str]:
        """Answer the test's first questions greedily, with the calculator."""
        engine, chosen = self.loader.engine, range(min(SAMPLES, len(self.test)))
        engine.refresh_weights()
        questions = [self.test[index] for index in chosen]
        prompts = [render_question(self.tokenizer, q, engine.max_length)[0] for q in questions]
        sampling = SamplingParams(self.eval_sampling.max_new_tokens, temperature=0.0)
        answers = answer_problems(engine, self.tokenizer, self.test, chosen, prompts, sampling)
        texts = {}
        for question, answer in zip(questions, answers, strict=True):
            parts = read_parts(self.tokenizer, answer.completion.token_ids)
            shown = "".join(
                part["text"] if part["type"] == "text" else f"[{part['text']}]" for part in parts
            )
            asked = question["messages"][0]["content"]
            texts[asked[:60]] = f"{asked} {shown}"
        return texts
