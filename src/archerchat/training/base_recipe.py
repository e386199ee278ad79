"""Feed the loop when it pretrains: packed batches, the chunked loss, the dial's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archerchat.checkpoint import Checkpoint, save_checkpoint
from archerchat.data.loader import TokenLoader
from archerchat.errors import CheckpointError
from archerchat.evals.bits_per_byte import evaluate_bits_per_byte
from archerchat.inference.sampling import iter_tokens
from archerchat.model.compiling import compiled
from archerchat.model.loss import chunk_loss_and_gradients, chunk_losses, mean_loss, token_losses
from archerchat.model.transformer import Regions, Transformer
from archerchat.optim.optimizer import Optimizer
from archerchat.optim.schedule import Schedule
from archerchat.runtime import Runtime
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.training.loop import LoopState, StepSettings
from archerchat.training.progress import ProgressLine
from archerchat.training.resume import restore_loader, restore_rng, rng_tensors

SAMPLE_PROMPTS = ("The capital of France is", "def main(", "If yesterday was Friday, then tomorrow")
SAMPLE_TOKENS = 24


@dataclass
class BaseRecipe:
    """Feed the loop, measure the model, save and restore what a checkpoint holds."""

    runtime: Runtime
    model: Transformer
    optimizer: Optimizer
    schedule: Schedule
    loader: TokenLoader
    open_validation: Callable[[], TokenLoader]
    """Start over on the validation shard."""
    tokenizer: Tokenizer
    eval_steps: int
    """Batches of an evaluation, unless the validation text ends before."""
    validation_bytes: int
    """Text in the validation shard."""
    compile: bool
    directory: Path
    keep_last: int
    meta: dict[str, Any]
    """What every checkpoint says of the run."""
    progress: ProgressLine | None = None
    """Where to say how far an evaluation is."""

    def __post_init__(self) -> None:
        self._regions = Regions.compiled() if self.compile else Regions()
        self._loss_kernel: Callable[..., tuple[Tensor, ...]] = chunk_loss_and_gradients
        self._losses_kernel: Callable[..., Tensor] = chunk_losses
        if self.compile:
            self._loss_kernel = compiled(chunk_loss_and_gradients)
            self._losses_kernel = compiled(chunk_losses)
        self._token_bytes = torch.from_numpy(self.tokenizer.token_bytes).to(self.runtime.device)

    def next_micro_batch(self) -> tuple[Tensor, Tensor]:
        """Return the loader's next batch on the device."""
        batch = next(self.loader)
        return self._to_device(batch.inputs), self._to_device(batch.targets)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of (B, T) targets."""
        hidden = self.model.hidden(inputs, self._regions)
        weight, size = self.model.unembedding.weight, self.model.config.vocab_size
        return mean_loss(hidden, weight, targets, size, self._loss_kernel)

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
        texts = {}
        for prompt in SAMPLE_PROMPTS:
            prompt_ids = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
            stop = (self.tokenizer.bos_id,)
            ids = iter_tokens(self.model, prompt_ids, SAMPLE_TOKENS, 0.0, stop_ids=stop)
            texts[prompt] = prompt + self.tokenizer.decode(list(ids))
        return texts

    def save(self, state: LoopState, scaler: Mapping[str, Any]) -> None:
        """Write all that `restore` needs, and prune older checkpoints."""
        loader_json, loader_arrays = self.loader.state().to_parts()
        sections = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state,
            "loader": {name: torch.from_numpy(a) for name, a in loader_arrays.items()},
            "rng": rng_tensors(),
        }
        progress = {
            "loop": asdict(state),
            "optimizer_steps": self.optimizer.steps_taken,
            "loader": loader_json,
            "scaler": dict(scaler),
        }
        save_checkpoint(
            self.directory, state.step, sections, self.meta | progress, keep_last=self.keep_last
        )

    def restore(self, checkpoint: Checkpoint, extend: bool) -> tuple[LoopState, dict[str, Any]]:
        """Set everything to what `save` wrote; return the loop's and the scaler's state.

        Raises:
            CheckpointError: the checkpoint does not fit this run.
        """
        meta, tensors = checkpoint.meta, checkpoint.tensors
        try:
            self.model.load_state_dict(tensors["model"])
            self.optimizer.load_state(tensors["optimizer"], meta["optimizer_steps"])
            restore_loader(self.loader, checkpoint, extend)
            restore_rng(tensors["rng"])
            return LoopState(**meta["loop"]), dict(meta["scaler"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{checkpoint.path} does not fit this run: {error!r}") from error

    def _token_losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Run the graph of training, gradients and all: another would be compiled without them."""
        with torch.enable_grad():
            hidden = self.model.hidden(inputs, self._regions).detach()
        weight, size = self.model.unembedding.weight, self.model.config.vocab_size
        return token_losses(hidden, weight, targets, size, self._losses_kernel)

    def _iter_batches(self, loader: TokenLoader, count: int) -> Iterator[tuple[Tensor, Tensor]]:
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

    def _to_device(self, array: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.runtime.device.type == "cuda":
            return tensor.pin_memory().to(self.runtime.device, non_blocking=True)
        return tensor.to(self.runtime.device)
