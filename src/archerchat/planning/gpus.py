"""Published figures of NVIDIA's cards: peak matrix rate, memory, power.

Rates are those of dense (not sparse) bfloat16 or float16 tensor-core products that accumulate in
float32, as a training step runs them. There are two traps, both a factor of two: data sheets of
data-centre cards print the sparse rate first; and GeForce cards accumulate in float32 at half the
rate of float16, which is exactly twice the float32 shader rate. Workstation and data-centre cards
have no such limit. Cards without bfloat16 train in float32, so they have the shader rate as well.

Sources: the appendix tables of NVIDIA's architecture white papers (Volta V1.1, Turing V1, A100
V1.0, Ampere GA102 V2, Hopper H100 V1.04, Ada V2, RTX Blackwell V1) and, for the cards that these
leave out, the data sheets; for GeForce cards without a line of their own, published cores x boost
clock x 2 x 2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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


GPUS = (
    # Data centre, Blackwell (HGX and NVL72 data sheets, half of the sparse rate)
    Gpu("GB300", 2500, 279, 1400, rented=True),
    Gpu("B300", 2250, 268, 1100, rented=True),
    Gpu("GB200", 2500, 186, 1200, rented=True),
    Gpu("B200", 2250, 180, 1000, rented=True),
    # Data centre, Hopper
    Gpu("GH200", 989.4, 96, 900, rented=True),
    Gpu("H200 NVL", 835.5, 141, 600, rented=True),
    Gpu("H200", 989.4, 141, 700, rented=True),
    Gpu("H100 NVL", 835.5, 94, 400, rented=True),
    Gpu("H100 PCIe", 756.5, 80, 350, rented=True),
    Gpu("H100", 989.4, 80, 700, rented=True),
    Gpu("H800", 989.4, 80, 700, rented=True),
    Gpu("H20", 148, 96, 400, rented=True),
    # Data centre, Ampere and Ada
    Gpu("A100 80GB", 312, 80, 400, rented=True),
    Gpu("A100", 312, 40, 400, rented=True),
    Gpu("A800", 312, 80, 400, rented=True),
    Gpu("A40", 149.7, 48, 300, rented=True),
    Gpu("A30", 165, 24, 165, rented=True),
    Gpu("A10G", 70, 24, 300, rented=True),
    Gpu("A10", 125, 24, 150, rented=True),
    Gpu("L40S", 362.05, 48, 350, rented=True),
    Gpu("L40", 181.05, 48, 300, rented=True),
    Gpu("L4", 121, 24, 72, rented=True),
    # Data centre, before bfloat16 (V100 and T4 data sheets)
    Gpu("V100 PCIe", 112, 16, 250, rented=True, capability=(7, 0), float32_tflops=14.0),
    Gpu("V100", 125, 16, 300, rented=True, capability=(7, 0), float32_tflops=15.7),
    Gpu("T4", 65, 16, 70, rented=True, capability=(7, 5), float32_tflops=8.1),
    # Workstation
    Gpu("RTX PRO 6000 Blackwell Workstation", 503.8, 96, 600),
    Gpu("RTX 6000 Ada", 364.2, 48, 300),
    Gpu("RTX A6000", 154.8, 48, 300),
    Gpu("RTX A5000", 111.1, 24, 230),
    Gpu("RTX A4000", 76.7, 16, 140),
    # GeForce, Blackwell
    Gpu("RTX 5090", 209.5, 32, 575),
    Gpu("RTX 5080", 112.6, 16, 360),
    Gpu("RTX 5070 Ti", 87.9, 16, 300),
    Gpu("RTX 5070", 61.7, 12, 250),
    Gpu("RTX 5060 Ti", 47.4, 16, 180),
    Gpu("RTX 5060", 38.4, 8, 145),
    # GeForce, Ada
    Gpu("RTX 4090", 165.2, 24, 450),
    Gpu("RTX 4080 SUPER", 104.4, 16, 320),
    Gpu("RTX 4080", 97.5, 16, 320),
    Gpu("RTX 4070 Ti SUPER", 88.2, 16, 285),
    Gpu("RTX 4070 Ti", 80.2, 12, 285),
    Gpu("RTX 4070 SUPER", 71.0, 12, 220),
    Gpu("RTX 4070", 58.3, 12, 200),
    Gpu("RTX 4060 Ti", 44.1, 8, 160),
    Gpu("RTX 4060", 30.2, 8, 115),
    # GeForce, Ampere
    Gpu("RTX 3090 Ti", 80, 24, 450),
    Gpu("RTX 3090", 71, 24, 350),
    Gpu("RTX 3080 Ti", 68.2, 12, 350),
    Gpu("RTX 3080", 59.5, 10, 320),
    Gpu("RTX 3070 Ti", 43.5, 8, 290),
    Gpu("RTX 3070", 40.6, 8, 220),
    Gpu("RTX 3060 Ti", 32.4, 8, 200),
    Gpu("RTX 3060", 25.5, 12, 170),
)

SLOWER_CHIP = {"laptop", "mobile", "max", "d", "mig"}
"""Words in the names of laptop cards, export models, and slices of a card."""


def find_gpu(device_name: str) -> Gpu | None:
    """Return the most specific card whose words are all in `device_name`, or None.

    The words may be apart ("A100-SXM4-80GB" is an "A100 80GB") but must be whole ("L40S" is no
    "L40"). Slower chips do not match the full card.
    """
    words = _words(device_name)
    matches = [g for g in GPUS if _words(g.name) <= words and not words & SLOWER_CHIP]
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
