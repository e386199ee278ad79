"""Published figures of NVIDIA's cards (`gpus.toml`), and what an hour of one costs."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from archerchat.config import Config, NonNegativeFloat
from archerchat.runtime import training_dtype

DOLLARS_PER_H100_HOUR = 3.0
"""Eight H100s for two hours cost $48."""
H100_TFLOPS = 989.4


@dataclass(frozen=True)
class Gpu:
    name: str
    """Words that must all be in the name that the driver reports."""
    tflops: float
    """Dense 16-bit tensor-core TFLOP/s, float32 accumulate."""
    memory_gib: int
    board_watts: int
    rented: bool = False
    """Whether people usually rent this card."""
    capability: tuple[int, int] = (8, 0)
    """Compute capability; a lower bound for cards after the A100."""
    float32_tflops: float | None = None
    """Float32 TFLOP/s, for cards on which training runs in it."""

    def flops_per_second(self, dtype: torch.dtype) -> float | None:
        """Return the peak rate in `dtype`, or None if this table has none."""
        if dtype == torch.float32:
            return self.float32_tflops * 1e12 if self.float32_tflops else None
        if dtype in (torch.float16, training_dtype(self.capability)):
            return self.tflops * 1e12
        return None

    @property
    def price_per_hour(self) -> float | None:
        """Usual rent in dollars, scaled from an H100's by speed; None for cards that people own."""
        return DOLLARS_PER_H100_HOUR * self.tflops / H100_TFLOPS if self.rented else None


@cache
def known_gpus() -> tuple[Gpu, ...]:
    """Return the cards of `gpus.toml`."""
    cards = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    for card in cards.values():
        card["capability"] = tuple(card.get("capability", Gpu.capability))
    return tuple(Gpu(name, **card) for name, card in cards.items())


SLOWER_CHIP = {"laptop", "mobile", "max", "d", "mig"}
"""Words in the names of laptop cards, export models, and slices of a card."""


def find_gpu(device_name: str) -> Gpu | None:
    """Return the most specific card whose words are all in `device_name`, or None.

    The words may be apart ("A100-SXM4-80GB" is an "A100 80GB") but must be whole ("L40S" is no
    "L40"). Slower chips do not match the full card.
    """
    words = _words(device_name)
    matches = [g for g in known_gpus() if _words(g.name) <= words and not words & SLOWER_CHIP]
    return max(matches, key=lambda gpu: len(_words(gpu.name)), default=None)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))


@dataclass(frozen=True)
class Prices(Config):
    """Prices for estimating costs."""

    price_per_hour: NonNegativeFloat | None = None
    """Dollars per hour and device. Defaults to an estimate for cards that are usually rented."""
    price_per_kwh: NonNegativeFloat = 0.30
    """Dollars per kilowatt-hour of electricity, for cards that you own."""

    def per_hour(self, gpu: Gpu | None) -> tuple[float | None, str]:
        """Return the dollars per hour of one device, None if unknown, and a note about them."""
        if self.price_per_hour is not None:
            return self.price_per_hour, f"${self.price_per_hour:,.2f} per hour and device"
        if gpu is None:
            return None, "no price is known for this device; set --price-per-hour"
        if (rent := gpu.price_per_hour) is not None:
            return rent, f"${rent:,.2f} per hour and device, assumed; --price-per-hour sets it"
        source = f"{gpu.board_watts} W at ${self.price_per_kwh:.2f} per kWh"
        return gpu.board_watts / 1000 * self.price_per_kwh, f"electricity of the card, {source}"
