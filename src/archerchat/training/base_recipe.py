"""Feed the loop when it pretrains: packed batches, the chunked loss, the dial's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from archerchat.data.text_loader import TextLoader
from archerchat.evals.bits_per_byte import evaluate_bits_per_byte
from archerchat.inference.chat import generate_texts
from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams
from archerchat.optim.schedule import Schedule
from archerchat.training.model_recipe import ModelRecipe
from archerchat.training.recipe import StepSettings

SAMPLE_PROMPTS = ("The capital of France is", "def main(", "If yesterday was Friday, then tomorrow")
SAMPLE_TOKENS = 24


@dataclass(kw_only=True)
class BaseRecipe(ModelRecipe):
    """Feed the loop with text, and measure the model on other text."""

    loader: TextLoader
    schedule: Schedule
    open_validation: Callable[[], TextLoader]
    """Start over on the validation shard."""
    eval_steps: int
    """Batches of an evaluation, unless the validation text ends before."""
    validation_bytes: int
    """Text in the validation shard."""

    def settings(self, step: int) -> StepSettings:
        """Read the schedules at `step`."""
        return StepSettings(
            self.schedule.lr_multiplier(step),
            self.schedule.muon_momentum(step),
            self.schedule.muon_weight_decay(step),
        )

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Measure bits per byte on the start of the validation shard."""
        with self.open_validation() as loader:
            batches = self._iter_batches(loader, self.eval_steps)
            bits = evaluate_bits_per_byte(self._token_losses, batches, self._token_bytes)
        return {"val/bpb": bits}

    def sample(self, step: int) -> Mapping[str, str]:
        """Continue each prompt greedily."""
        bos, encode = self.tokenizer.bos_id, self.tokenizer.encode
        prompts = [[bos, *encode(prompt)] for prompt in SAMPLE_PROMPTS]
        engine = Engine(self.model, max_batch=len(prompts))
        params = SamplingParams(SAMPLE_TOKENS, temperature=0, stop_token_ids=(bos,))
        texts = generate_texts(engine, self.tokenizer, prompts, params)
        return {prompt: prompt + text for prompt, text in zip(SAMPLE_PROMPTS, texts, strict=True)}

    def _iter_batches(self, loader: TextLoader, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `count` batches, or as many as hold the validation text once."""
        sizes, seen = self.tokenizer.token_bytes, 0
        for index in range(count):
            batch = next(loader)
            yield self._to_device(batch.inputs), self._to_device(batch.targets)
            seen += int(sizes[batch.targets].sum())
            if self.progress is not None:
                share = max((index + 1) / count, seen / self.validation_bytes)
                self.progress.busy(f"evaluating: {min(1.0, share):.0%}")
            if seen >= self.validation_bytes:
                return
