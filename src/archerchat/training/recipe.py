"""What the loop and a recipe tell each other: a step's settings, when to do what, how far it is.

A recipe brings the batches, the loss and the schedules (`Recipe`); its command says when the loop
does more than train (`Cadence`); a checkpoint holds both the recipe's state and `LoopState`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class StepSettings:
    """What the schedule gives one step."""

    lr_multiplier: float
    muon_momentum: float
    muon_weight_decay: float


@dataclass(frozen=True)
class Cadence:
    """When the loop does more than train; None is never, the end excepted."""

    num_iterations: int | Callable[[int], int]
    """Steps in all; where the data decides, an estimate of them by the steps done, which is their
    number itself once the data is used up."""
    grad_accum_steps: int
    tokens_per_step: int | Callable[[], int]
    """Over all ranks; where steps differ, those of the step that is done."""
    flops_per_step: int | Callable[[], int]
    eval_every: int | None = None
    sample_every: int | None = None
    save_every: int | None = None
    core_every: int | None = None

    def steps_in_all(self, step: int) -> int:
        """Return how many steps the run has, as far as is known after `step` of them."""
        given = self.num_iterations
        return given(step) if callable(given) else given

    def amounts(self) -> tuple[int, int]:
        """Return the tokens and the operations of the step that is done."""
        tokens, flops = self.tokens_per_step, self.flops_per_step
        return tokens() if callable(tokens) else tokens, flops() if callable(flops) else flops


@dataclass
class LoopState:
    """What a checkpoint holds of the loop itself."""

    step: int = 0
    """Updates done."""
    smooth_loss: float = 0.0
    """Exponential average of the training loss, not yet corrected for its start at 0."""
    first_val: float = math.nan
    """Bits per byte when it was first measured."""
    last_val: float = math.nan
    best_val: float = math.inf
    best_saved: float = math.inf
    """What the best checkpoint scored right after it was saved, as `BEST_BY` turns it."""
    tokens: int = 0
    """Trained on, over all ranks."""
    flops: int = 0
    training_seconds: float = 0.0
    """Time in training steps, evaluations and saving excluded."""


Measure = Callable[[int], Mapping[str, float]]
"""Returns a step's metrics by name."""


class Recipe(Protocol):
    """What the loop asks of pretraining, fine-tuning and reinforcement learning."""

    def next_micro_batch(self) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (B, T) on the device."""

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the micro-batch's mean loss."""

    def settings(self, step: int) -> StepSettings: ...

    def step_metrics(self) -> Mapping[str, float]:
        """Return what else to log of the step that is done, by name."""

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Return metrics by name; `val/bpb` is the one whose best value is kept."""

    def sample(self, step: int) -> Mapping[str, str]:
        """Return texts by the name of their prompt."""

    def save(self, state: LoopState, scaler: Mapping[str, Any]) -> None: ...

    def checkpoint_path(self, step: int) -> Path | None:
        """Return where the checkpoint of `step` is, if there is one."""
