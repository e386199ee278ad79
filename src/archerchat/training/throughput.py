"""How fast steps are: the rate, its share of the peak, the time that is left."""

from __future__ import annotations

import math

WARMUP_STEPS = 5
"""Steps after a start that are left out of speed figures: they compile and fill caches."""
RECENT_STEPS = 100
"""Steps that the time left is estimated from."""


class Throughput:
    """Collect the times of a call's steps.

    Args:
        peak_flops_per_second: of all devices together.
    """

    def __init__(self, peak_flops_per_second: float) -> None:
        self.wait_seconds = 0.0
        """Of the steps' time, spent waiting for a batch."""
        self._peak = peak_flops_per_second
        self._seconds: list[float] = []
        self._tokens = self._flops = 0

    def add(self, seconds: float, tokens: int, flops: int) -> None:
        """Count a step that is done."""
        self._seconds.append(seconds)
        self._tokens += tokens
        self._flops += flops

    def mfu(self, flops: float, seconds: float) -> float:
        """Return the share of the peak at which `flops` operations took `seconds`."""
        return flops / seconds / self._peak

    def seconds_left(self, steps: int) -> float | None:
        """Return about how long `steps` more take; None while there is nothing to tell it from."""
        steady = self._seconds[WARMUP_STEPS:][-RECENT_STEPS:]
        if not steady:
            return None if steps else 0.0
        return steps * _median(steady)

    def figures(self) -> tuple[float, float, float]:
        """Return tokens per second, their share of the peak, and the share of waiting.

        The rate is that of the median step after the warm-up, or of fewer steps' median; NaN
        without any.
        """
        steps, spent = max(1, len(self._seconds)), sum(self._seconds)
        measured = self._seconds[WARMUP_STEPS:] or self._seconds
        typical = _median(measured) if measured else math.nan
        return (
            self._tokens / steps / typical,
            self.mfu(self._flops / steps, typical),
            self.wait_seconds / spent if spent else 0.0,
        )


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
