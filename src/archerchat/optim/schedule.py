"""Learning rate, Muon momentum and weight decay at each iteration (SPEC section 3).

The rate rises linearly, holds, and falls linearly to a small rest. Momentum rises over the
first steps, while gradients still turn quickly, and falls again with the rate. Weight decay
follows half a cosine to zero. All three are pure functions of the iteration, so a resumed run
needs no state for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from archerchat.dial import DialConfig, Hyperparameters

MOMENTUM_START = 0.85
MOMENTUM_PEAK = 0.97
MOMENTUM_END = 0.90
MOMENTUM_WARMUP_STEPS = 400


@dataclass(frozen=True)
class Schedule:
    """Give the optimizer's settings at iteration `it`, 0 <= it <= num_iterations.

    The ramps end at `it` = num_iterations, one step after the last.
    """

    num_iterations: int
    """Optimizer steps of the whole run, N."""
    weight_decay: float
    """Muon's weight decay at the first step, scaled by the dial."""
    warmup_steps: int = 40
    """Steps over which the learning rate rises; wins over the warm-down."""
    warmdown_ratio: float = 0.65
    """Share of N over which the learning rate falls."""
    final_lr_frac: float = 0.05
    """Learning-rate multiplier at N."""

    @property
    def warmdown_steps(self) -> int:
        return round(self.warmdown_ratio * self.num_iterations)

    @property
    def warmdown_start(self) -> int:
        """Last iteration before the rate falls."""
        return self.num_iterations - self.warmdown_steps

    def lr_multiplier(self, it: int) -> float:
        """Return the factor on every group's learning rate."""
        self._check(it)
        if it < self.warmup_steps:
            return (it + 1) / self.warmup_steps
        if it <= self.warmdown_start:
            return 1.0
        left = (self.num_iterations - it) / self.warmdown_steps
        return left + (1 - left) * self.final_lr_frac

    def muon_momentum(self, it: int) -> float:
        """Return Muon's momentum."""
        self._check(it)
        if it < MOMENTUM_WARMUP_STEPS:
            done = it / MOMENTUM_WARMUP_STEPS
            return (1 - done) * MOMENTUM_START + done * MOMENTUM_PEAK
        if it <= self.warmdown_start:
            return MOMENTUM_PEAK
        done = (it - self.warmdown_start) / self.warmdown_steps
        return MOMENTUM_PEAK * (1 - done) + MOMENTUM_END * done

    def muon_weight_decay(self, it: int) -> float:
        """Return Muon's weight decay."""
        self._check(it)
        return self.weight_decay * 0.5 * (1 + math.cos(math.pi * it / self.num_iterations))

    def _check(self, it: int) -> None:
        assert 0 <= it <= self.num_iterations, f"iteration {it} of {self.num_iterations}"


def build_schedule(config: DialConfig, hyperparameters: Hyperparameters) -> Schedule:
    """Build the schedule of the run that the dial describes."""
    return Schedule(
        num_iterations=hyperparameters.num_iterations,
        weight_decay=hyperparameters.weight_decay,
        warmup_steps=config.warmup_steps,
        warmdown_ratio=config.warmdown_ratio,
        final_lr_frac=config.final_lr_frac,
    )
