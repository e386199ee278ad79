"""A run's progress, its speed and how it ended."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median_high

WARMUP_STEPS = 5
"""Steps after a start that speed figures leave out, because they compile and fill caches."""
RECENT_STEPS = 100
"""Number of steps from which the time left is estimated."""


OVERFITTING = (
    "{} gets worse while the training loss falls: the model memorises its training data. More data "
    "or fewer steps would help"
)


@dataclass
class LoopState:
    """The loop's own state in a checkpoint."""

    step: int = 0
    """Updates done."""
    smooth_loss: float = 0.0
    """Exponential average of the training loss, not yet corrected for its start at 0."""
    first_smoothed: int = 0
    """Step at which that average began: later for an imported run."""
    first_val: float = math.nan
    """The recipe's metric when it was first measured."""
    last_val: float = math.nan
    best_val: float = math.inf
    """Best `Metric.score` so far: lower is better."""
    best_smooth_loss: float = math.nan
    """The average training loss when the metric was best; infinite before the first step."""
    overfitting: bool = False
    """Whether the metric is worse than its best although the training loss has fallen since."""
    best_saved: float = math.inf
    """Score of the best checkpoint, measured right after it was saved."""
    tokens: int = 0
    """Tokens trained on, over all ranks."""
    flops: int = 0
    training_seconds: float = 0.0
    """Time in training steps, without evaluations and saving."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `Loop.run` ended."""

    finished: bool
    """False when a signal stopped it."""
    tokens_per_second: float = math.nan
    """Median over the steps after the warm-up, or over all of a short run; NaN without steps."""
    mfu: float = math.nan
    """Share of the peak that this rate reaches."""
    data_wait_share: float = 0.0
    """Share of the training time spent waiting for a batch."""


@dataclass
class Throughput:
    """Collect the times of the steps of one call of `Loop.run`."""

    peak: float
    """Floating-point operations per second of all devices together."""
    wait_seconds: float = 0.0
    """The part of the steps' time spent waiting for a batch."""
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    flops: int = 0

    def add(self, seconds: float, tokens: int, flops: int) -> None:
        """Count a step that is done."""
        self.seconds.append(seconds)
        self.tokens += tokens
        self.flops += flops

    def mfu(self, flops: float, seconds: float) -> float:
        """Return the share of the peak rate, given the time of `flops` operations."""
        return flops / seconds / self.peak

    def seconds_left(self, steps: int) -> float | None:
        """Estimate the time of `steps` more steps; None as long as there is no measurement."""
        steady = self.seconds[WARMUP_STEPS:][-RECENT_STEPS:]
        if not steady:
            return None if steps else 0.0
        return steps * median_high(steady)

    def outcome(self, finished: bool) -> Outcome:
        """Return the rate of the median step after the warm-up, and its share of the peak."""
        steps, spent = max(1, len(self.seconds)), sum(self.seconds)
        measured = self.seconds[WARMUP_STEPS:] or self.seconds
        typical = median_high(measured) if measured else math.nan
        return Outcome(
            finished,
            self.tokens / steps / typical,
            self.mfu(self.flops / steps, typical),
            self.wait_seconds / spent if spent else 0.0,
        )
