"""The model, batches, loss and schedule of a stage, as the training loop sees them.

The loop asks a `Recipe` for micro-batches, losses and settings, and never looks inside. Each
stage is one: `pretrain.py`, `sft.py`, `rl.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from archerchat.checkpoint import Stateful
from archerchat.console import ProgressLine
from archerchat.data.prefetch import Batch
from archerchat.evals.bits_per_byte import evaluate_bits_per_byte
from archerchat.model.flops import flops_per_token
from archerchat.model.loss import LossKernels, token_losses, weighted_loss
from archerchat.model.transformer import Regions, Transformer
from archerchat.optim.optimizer import Optimizer
from archerchat.runtime import Runtime
from archerchat.tokenizer.bpe import Tokenizer


class StepSettings(NamedTuple):
    """The schedules' values at one step."""

    lr_multiplier: float
    muon_momentum: float
    muon_weight_decay: float = 0.0


@dataclass(frozen=True)
class Metric:
    """The figure by which a stage's checkpoints are compared."""

    name: str
    """Name of the logged metric, such as "val/bpb"."""
    label: str
    """Name to print."""
    higher_is_better: bool = False

    @property
    def key(self) -> str:
        """Name in `summary.json`."""
        return self.name.replace("/", "_")

    def score(self, value: float) -> float:
        """Return a number that is lower for better values."""
        return -value if self.higher_is_better else value


@dataclass(frozen=True)
class Evaluation:
    """A measurement that the loop makes between steps and after the last one."""

    measure: Callable[[], Mapping[str, float]]
    """Returns metrics by name. Names with two slashes are logged, not printed."""
    every: int | None
    """Steps between measurements; None never measures."""
    seconds_name: str = "eval/seconds"
    """Metric for the time that it took."""
    tokens: int = 0
    """Approximate number of tokens that it reads, if that is known."""
    at_start: bool = True
    """Whether step 0 is measured too."""
    slow: bool = False
    """Whether the evaluation takes so long that a checkpoint is saved first."""


class BatchLoader(Stateful, Protocol):
    """An endless source of this rank's batches; checkpoints save its position."""

    def __next__(self) -> Batch: ...
    def close(self) -> None: ...


@dataclass(kw_only=True)
class Recipe(ABC):
    """Compute the loss of batches; hold everything that a checkpoint has to restore."""

    metric: ClassVar[Metric] = Metric("val/bpb", "validation bits per byte")

    runtime: Runtime
    model: Transformer
    optimizer: Optimizer
    loader: BatchLoader
    tokenizer: Tokenizer
    grad_accum_steps: int
    compile: bool = False
    evaluations: Sequence[Evaluation] = ()
    progress: ProgressLine | None = None
    """Shows the progress of evaluations."""

    @cached_property
    def regions(self) -> Regions:
        return Regions.compiled() if self.compile else Regions()

    @cached_property
    def kernels(self) -> LossKernels:
        return LossKernels.compiled() if self.compile else LossKernels()

    @abstractmethod
    def total_steps(self, step: int) -> int:
        """Return the number of steps of the run, as far as it is known after `step` steps."""

    @abstractmethod
    def settings(self, step: int) -> StepSettings:
        """Read the schedules at `step`."""

    @abstractmethod
    def step_tokens(self) -> int:
        """Return the tokens of the last step, over all ranks."""

    @abstractmethod
    def sample(self) -> Mapping[str, str]:
        """Return texts written by the model, by prompt."""

    def step_flops(self) -> int:
        """Return the floating-point operations of the last step, over all ranks."""
        return flops_per_token(self.model.config) * self.step_tokens()

    def step_metrics(self) -> Mapping[str, float]:
        """Return the stage's own metrics of the last step, by name."""
        return {}

    def next_micro_batch(self) -> tuple[Tensor, Tensor]:
        """Return the loader's next inputs and targets (B, T) on the device."""
        return self.to_device(next(self.loader))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of the trained targets (B, T)."""
        weight, size = self.model.unembedding.weight, self.model.config.vocab_size
        return weighted_loss(self.hidden(inputs), weight, targets, size, kernels=self.kernels)

    def hidden(self, inputs: Tensor) -> Tensor:
        """Return the unembedding's input (B, T, C)."""
        return self.model.hidden(inputs, self.regions)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return each section of a checkpoint."""
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators["cuda"] = torch.cuda.get_rng_state()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "rng": generators,
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Continue from what `state_dict` returned; torch's errors say what does not fit."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if "loader" in state:  # an imported run has none
            self.loader.load_state_dict(state["loader"])
            torch.set_rng_state(state["rng"]["cpu"])
            if "cuda" in state["rng"] and torch.cuda.is_available():
                torch.cuda.set_rng_state(state["rng"]["cuda"])

    def bits_per_byte(self, batches: Iterable[Batch]) -> float:
        """Measure bits per byte of the targets in all ranks' `batches`."""
        token_bytes = torch.from_numpy(self.tokenizer.token_bytes).to(self.runtime.device)
        weight, size = self.model.unembedding.weight, self.model.config.vocab_size

        def losses(inputs: Tensor, targets: Tensor) -> Tensor:
            with torch.enable_grad():  # the graph of training: another would be compiled without
                hidden = self.hidden(inputs).detach()
            return token_losses(hidden, weight, targets, size, self.kernels)

        pairs = (self.to_device(batch) for batch in batches)
        return evaluate_bits_per_byte(losses, pairs, token_bytes, self.optimizer.ranks)

    def show_progress(self, what: str, share: float | None = None) -> None:
        """Show on the progress line what is being done, and which share of it is done."""
        if self.progress is not None:
            self.progress.show(what if share is None else f"{what}: {min(1.0, share):.0%}")

    def to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Copy inputs and targets (B, T) in one transfer, which is asynchronous on CUDA."""
        pair = torch.from_numpy(batch.stacked)
        if self.runtime.device.type == "cuda":
            pair = pair.pin_memory().to(self.runtime.device, non_blocking=True)
        inputs, targets = pair.to(self.runtime.device).unbind()
        return inputs, targets
