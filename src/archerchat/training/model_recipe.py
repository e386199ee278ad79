"""What every recipe shares: the model's compiled forward pass and loss, and its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archerchat.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    save_checkpoint,
)
from archerchat.console import ProgressLine
from archerchat.errors import CheckpointError
from archerchat.model.loss import LossKernels, mean_loss, token_losses
from archerchat.model.transformer import Regions, Transformer
from archerchat.optim.optimizer import Optimizer
from archerchat.runtime import Runtime
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.training.recipe import LoopState, Recipe
from archerchat.training.resume import (
    Loader,
    restore_loader,
    restore_rng,
    rng_tensors,
)


class Batch(Protocol):
    """What a recipe needs of a batch."""

    @property
    def inputs(self) -> NDArray[np.int64]: ...
    @property
    def targets(self) -> NDArray[np.int64]: ...


class BatchLoader(Loader, Protocol):
    """Yield batches, and tell the state after the last one."""

    def __next__(self) -> Batch: ...


@dataclass(kw_only=True)
class ModelRecipe(Recipe):
    """Compute the loss of batches, save and restore what a checkpoint holds."""

    runtime: Runtime
    model: Transformer
    optimizer: Optimizer
    loader: BatchLoader
    tokenizer: Tokenizer
    compile: bool
    directory: Path
    keep_last: int
    meta: dict[str, Any]
    """What every checkpoint says of the run."""
    progress: ProgressLine | None = None
    """Where to say how far an evaluation is."""

    def __post_init__(self) -> None:
        self._regions = Regions.compiled() if self.compile else Regions()
        self._kernels = LossKernels.compiled() if self.compile else LossKernels()
        self._token_bytes = torch.from_numpy(self.tokenizer.token_bytes).to(self.runtime.device)

    def next_micro_batch(self) -> tuple[Tensor, Tensor]:
        """Return the loader's next batch on the device."""
        batch = next(self.loader)
        return self._to_device(batch.inputs), self._to_device(batch.targets)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of (B, T) targets."""
        weight, size = self.model.unembedding.weight, self.model.config.vocab_size
        return mean_loss(self._hidden(inputs), weight, targets, size, self._kernels)

    def step_metrics(self) -> Mapping[str, float]:
        """Return nothing: the loop's own figures say it all."""
        return {}

    def final_metrics(self) -> Mapping[str, float]:
        """Return what else a finished run's summary holds, by name."""
        return self.step_metrics()

    def save(self, state: LoopState, scaler: Mapping[str, Any]) -> None:
        """Write all that `restore` needs, and prune older checkpoints."""
        loader = self.loader.state_dict()
        tensors = {name: value for name, value in loader.items() if isinstance(value, Tensor)}
        sections = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state,
            "loader": tensors,
            "rng": rng_tensors(),
        }
        progress = {
            "loop": asdict(state),
            "optimizer_steps": self.optimizer.steps_taken,
            "loader": {name: value for name, value in loader.items() if name not in tensors},
            "scaler": dict(scaler),
        }
        save_checkpoint(
            self.directory, state.step, sections, self.meta | progress, keep_last=self.keep_last
        )

    def checkpoint_path(self, step: int) -> Path | None:
        """Return where the checkpoint of `step` is, if there is one."""
        saved = step in list_checkpoints(self.directory)
        return find_checkpoint(self.directory, step) if saved else None

    def restore(self, checkpoint: Checkpoint, extend: bool) -> tuple[LoopState, dict[str, Any]]:
        """Set everything to what `save` wrote; return the loop's and the scaler's state.

        Raises:
            CheckpointError: the checkpoint does not fit this run.
        """
        meta, tensors = checkpoint.meta, checkpoint.tensors
        try:
            self.model.load_state_dict(tensors["model"])
            self.optimizer.load_state(tensors["optimizer"], meta["optimizer_steps"])
            restore_loader(self.loader, checkpoint)
            restore_rng(tensors["rng"])
            return LoopState(**meta["loop"]), dict(meta["scaler"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{checkpoint.path} does not fit this run: {error!r}") from error

    def _hidden(self, inputs: Tensor) -> Tensor:
        """Return the unembedding's input (B, T, C)."""
        return self.model.hidden(inputs, self._regions)

    def _token_losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Run the graph of training, gradients and all: another would be compiled without them."""
        with torch.enable_grad():
            hidden = self._hidden(inputs).detach()
        weight, size = self.model.unembedding.weight, self.model.config.vocab_size
        return token_losses(hidden, weight, targets, size, self._kernels)

    def _to_device(self, array: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.runtime.device.type == "cuda":
            return tensor.pin_memory().to(self.runtime.device, non_blocking=True)
        return tensor.to(self.runtime.device)
