"""What the loop counts: a run's state, which checkpoints hold, and the speed of one session."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from statistics import median_high

from archerchat.training.recipe import Metric

SMOOTHING = 0.9
OVERFIT_SHARE = 0.002
"""Share by which the metric must exceed its best for a warning; steps vary by less."""
WARMUP_STEPS = 5
"""Steps after a start that speed figures leave out, because they compile and fill caches."""
RECENT_STEPS = 100
"""Number of steps from which the time left is estimated."""


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

    @property
    def average_loss(self) -> float:
        """`smooth_loss`, corrected for its start at 0; there must have been a step."""
        return self.smooth_loss / (1 - SMOOTHING ** (self.step - self.first_smoothed))

    def note_step(self, loss: float, seconds: float) -> None:
        self.step += 1
        self.training_seconds += seconds
        self.smooth_loss = SMOOTHING * self.smooth_loss + (1 - SMOOTHING) * loss

    def note_metric(self, metric: Metric, value: float) -> None:
        score, best = metric.score(value), self.best_val
        smooth = self.average_loss if self.step > self.first_smoothed else math.inf
        if score < best:
            self.best_smooth_loss = smooth
        # A policy's loss says nothing of its pass rate, which is better when higher.
        worse = not metric.higher_is_better and value > best * (1 + OVERFIT_SHARE)
        self.overfitting = worse and smooth < self.best_smooth_loss
        self.first_val = value if math.isnan(self.first_val) else self.first_val
        self.last_val, self.best_val = value, min(best, score)


@dataclass
class Speed:
    """The times of the steps of one call of `Loop.run`."""

    peak: float
    """Floating-point operations per second of all devices together."""
    seconds: list[float] = field(default_factory=list)
    wait_seconds: float = 0.0
    """The part of the steps' time spent waiting for a batch."""
    tokens: int = 0
    flops: int = 0
    marks: list[float] = field(default_factory=list)
    """When the running step began, and each of its micro-batches ended; empty between steps."""

    def per_second(self, total: float) -> float:
        """Return what all steps did per second of the median step after the warm-up, or of a short
        run's median step; NaN without steps."""
        measured = self.seconds[WARMUP_STEPS:] or self.seconds
        return total / len(self.seconds) / median_high(measured) if measured else math.nan

    @property
    def tokens_per_second(self) -> float:
        return self.per_second(self.tokens)

    @property
    def mfu(self) -> float:
        return self.per_second(self.flops) / self.peak

    @property
    def data_wait_share(self) -> float:
        return self.wait_seconds / sum(self.seconds) if self.seconds else 0.0

    def seconds_left(self, steps: int) -> float | None:
        """Estimate the time of `steps` more steps; None as long as there is no measurement."""
        steady = self.seconds[WARMUP_STEPS:][-RECENT_STEPS:]
        if not steady:
            return None if steps else 0.0
        return steps * median_high(steady)

    def seconds_left_of_step(self, micro_batches: int) -> float | None:
        """Estimate the rest of the running step; None if nothing tells it, or it is nearly over."""
        began, *ends = self.marks
        if self.seconds:
            left = began + self.seconds[-1] - time.perf_counter()
        elif len(ends) > 1:  # the first one may have compiled; on CUDA, they may still be running
            each = (ends[-1] - ends[0]) / (len(ends) - 1)
            left = each * (micro_batches - len(ends))
        else:
            return None
        return left if left >= 1 else None
