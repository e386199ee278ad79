"""How fast training is: the median step's tokens per second, MFU, and the time left."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

WARMUP_STEPS = 5
"""Steps after a start that are left out of speed figures: they compile and fill caches."""
RECENT_STEPS = 100
"""Steps that the time left is estimated from."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    finished: bool
    """False when a signal stopped it."""
    tokens_per_second: float = math.nan
    """Median over the steps after the warm-up, or over all of fewer steps; NaN without any."""
    mfu: float = math.nan
    """That rate's share of the peak."""
    data_wait_share: float = 0.0
    """Share of the training time spent waiting for a batch."""


@dataclass
class Throughput:
    """Collect the times of a call's steps."""

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
        """Return the share of the peak at which `flops` operations took `seconds`."""
        return flops / seconds / self.peak

    def seconds_left(self, steps: int) -> float | None:
        """Estimate how long `steps` more take; None while there is nothing to estimate from."""
        steady = self.seconds[WARMUP_STEPS:][-RECENT_STEPS:]
        if not steady:
            return None if steps else 0.0
        return steps * _median(steady)

    def outcome(self, finished: bool) -> Outcome:
        """Return the rate of the median step after the warm-up, and its share of the peak."""
        steps, spent = max(1, len(self.seconds)), sum(self.seconds)
        measured = self.seconds[WARMUP_STEPS:] or self.seconds
        typical = _median(measured) if measured else math.nan
        return Outcome(
            finished,
            self.tokens / steps / typical,
            self.mfu(self.flops / steps, typical),
            self.wait_seconds / spent if spent else 0.0,
        )


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
