"""Axes of charts: from values to places, where the ticks go, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Scale:
    """Map values between `low` and `high` to places between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Return where a value stands; beyond the ends it goes on."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)


def build_scale(
    values: Sequence[float],
    start: float,
    end: float,
    *,
    log: bool = False,
    pad: float = 0.0,
) -> Scale:
    """Return a scale that holds all values, with a share `pad` of room at both ends.

    Args:
        values: finite, at least one; positive ones on a logarithmic scale.
    """
    bottom, top = min(values), max(values)
    if log:
        bottom, top = math.log10(bottom), math.log10(top)
    if top - bottom <= 1e-12 * max(abs(top), abs(bottom)):  # one value: give it room
        room = abs(top) * 0.1 or 1.0
        bottom, top = bottom - room, top + room
    room = pad * (top - bottom)
    bottom, top = bottom - room, top + room
    if log:
        bottom, top = 10**bottom, 10**top
        return Scale(bottom, top, start, end, log_ticks(bottom, top), log=True)
    return Scale(bottom, top, start, end, linear_ticks(bottom, top))


def linear_ticks(low: float, high: float, most: int = 6) -> tuple[float, ...]:
    """Return up to `most` multiples of 1, 2 or 5 times a power of ten from `low` to `high`."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10, 20) if (high - low) / (m * power) <= most)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return tuple(i * step for i in range(first, last + 1))


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return powers of ten, with their multiples by 2 and 5 where there is room."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = range(first, last + 1, max(1, round((last - first) / 5)))
    factors = (1,) if high / low > 200 else (1, 2, 5)
    ticks = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
    return tuple(ticks) if len(ticks) > 1 else linear_ticks(low, high, 4)


def compact(value: float, digits: int = 3) -> str:
    """Write a number in a few characters: 1.5k, 0.012, 2.5M."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, suffix in SUFFIXES:
        if size >= unit * (1 - 0.5 * 10.0**-digits):
            return f"{value / unit:.{digits}g}{suffix}" if size < 1e15 else f"{value:.{digits}g}"
    return f"{value:.{digits}g}"
