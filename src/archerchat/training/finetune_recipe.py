"""Feed the loop when it fine-tunes: rows of conversations, and schedules by progress (SPEC 7)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from archerchat.data.conversation_loader import ConversationLoader
from archerchat.evals.bits_per_byte import evaluate_bits_per_byte
from archerchat.inference.chat import generate_texts
from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.tools import answer_stop_ids
from archerchat.tokenizer.chat_format import render_for_completion
from archerchat.training.model_recipe import ModelRecipe
from archerchat.training.recipe import LoopState, StepSettings

RATE_SCALE = 0.8
"""On the base model's rates."""
WARMDOWN_START = 0.5
"""Progress at which the rate begins to fall, to 0 at the end."""
MOMENTUM_START = 0.85
MOMENTUM_PEAK = 0.95
MOMENTUM_WARMUP_STEPS = 300
SAMPLE_QUESTIONS = ("Who are you?", "How many r are in strawberry?", "What is 12 + 30?")
SAMPLE_TOKENS = 64


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
class FinetuneRecipe(ModelRecipe):
    """Feed the loop with one pass over a mixture, and measure the model on another."""

    loader: ConversationLoader
    open_validation: Callable[[], ConversationLoader]
    """Start over on the validation mixture; it ends after a pass."""
    eval_steps: int
    """Batches of an evaluation, unless the validation mixture ends before."""
    num_iterations: int | None
    """Steps, where the pass is not over before; None leaves the end to the pass."""
    document_masking: bool
    """Whether the conversations of a row cannot see each other."""
    first_estimate: int
    """About how many steps a pass takes, until its own progress tells."""

    def steps_in_all(self, step: int) -> int:
        """Return the run's length as far as is known after `step` steps; `step` ends it."""
        progress = self.loader.progress
        if progress >= 1 or step == self.num_iterations:
            return step
        estimate = math.ceil(step / progress) if step and progress else self.first_estimate
        if self.num_iterations is not None:
            estimate = min(estimate, self.num_iterations)
        return max(estimate, step + 1)

    def progress_at(self, step: int) -> float:
        """Return how much of the run is done before `step`, from 0 to 1."""
        by_steps = step / self.num_iterations if self.num_iterations else 0.0
        return max(by_steps, self.loader.progress)

    def settings(self, step: int) -> StepSettings:
        """Read the schedules at `step`; nothing decays."""
        return StepSettings(lr_multiplier(self.progress_at(step)), muon_momentum(step), 0.0)

    def step_metrics(self) -> Mapping[str, float]:
        """Return what became of the conversations so far."""
        counts = self.loader.counts
        return {
            "data/conversations": self.loader.consumed,
            "data/progress": self.loader.progress,
            "data/cut": counts.cut,
            "data/dropped": counts.dropped,
            "data/padding_share": counts.padding_share,
            "data/trained_share": counts.trained_share,
        }

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Measure bits per byte of the answers in the validation mixture."""
        with self.open_validation() as loader:
            batches = self._iter_batches(loader)
            bits = evaluate_bits_per_byte(self._token_losses, batches, self._token_bytes)
        return {"val/bpb": bits}

    def sample(self, step: int) -> Mapping[str, str]:
        """Answer each question greedily, without tools."""
        questions = [{"messages": [{"role": "user", "content": q}]} for q in SAMPLE_QUESTIONS]
        prompts = [render_for_completion(self.tokenizer, question) for question in questions]
        engine = Engine(self.model, max_batch=len(prompts))
        stop_token_ids = answer_stop_ids(self.tokenizer)
        params = SamplingParams(SAMPLE_TOKENS, temperature=0, stop_token_ids=stop_token_ids)
        texts = generate_texts(engine, self.tokenizer, prompts, params)
        return {q: f"{q} {text}" for q, text in zip(SAMPLE_QUESTIONS, texts, strict=True)}

    def save(self, state: LoopState, scaler: Mapping[str, Any]) -> None:
        """Write all that `restore` needs, and whether the run is over."""
        finished = self.steps_in_all(state.step) == state.step
        self.meta = self.meta | {"finished": finished}
        super().save(state, scaler)

    def _hidden(self, inputs: Tensor) -> Tensor:
        if not self.document_masking:
            return super()._hidden(inputs)
        # Every conversation begins with BOS, and so does every token of padding.
        segments = (inputs == self.tokenizer.bos_id).cumsum(1)
        return self.model.hidden(inputs, self._regions, segments=segments)

    def _iter_batches(self, loader: ConversationLoader) -> Iterator[tuple[Tensor, Tensor]]:
        for index, batch in zip(range(self.eval_steps), loader, strict=False):
            yield self._to_device(batch.inputs), self._to_device(batch.targets)
            if self.progress is not None:
                share = max((index + 1) / self.eval_steps, loader.progress)
                self.progress.busy(f"evaluating: {min(1.0, share):.0%}")
