"""Add up the time of every stage, and what it cost: the rent of a card, or its electricity.

Time comes from the journals (training steps, evaluations) and the results' own clocks. The rest of
a session's wall time is compiling, sampling, saving and waiting for data. Time between sessions is
nobody's.
"""

from __future__ import annotations

from dataclasses import dataclass

from archerchat.planning.gpus import Gpu, find_gpu
from archerchat.planning.plan import DOLLARS_PER_H100_HOUR, H100_TFLOPS
from archerchat.report.results import Result
from archerchat.report.runs import Run, lookup


@dataclass(frozen=True)
class Prices:
    """What an hour or a kilowatt-hour costs, in dollars."""

    per_hour: float | None = None
    """Of one device; assumed for cards that are usually rented."""
    per_kwh: float = 0.30
    """For a card of one's own, at its board power."""


@dataclass(frozen=True)
class Spending:
    """What one stage took."""

    name: str
    training_seconds: float
    eval_seconds: float
    other_seconds: float
    cost: float | None
    """Dollars; None where nothing is known of the device."""

    @property
    def seconds(self) -> float:
        return self.training_seconds + self.eval_seconds + self.other_seconds


def run_spending(run: Run, prices: Prices) -> Spending:
    """Return what a run's sessions took."""
    training = sum(session.training_seconds for session in run.sessions)
    evaluating = sum(session.eval_seconds for session in run.sessions)
    wall = sum(session.end - session.start for session in run.sessions)
    # A session's first record is written after its model is built.
    other = max(0.0, wall - training - evaluating)
    seconds = training + evaluating + other
    cost = _cost(seconds, device_name(run), device_count(run), prices)
    return Spending(run.tag, training, evaluating, other, cost)


def result_spending(result: Result, run: Run, prices: Prices) -> Spending:
    """Return what an evaluation took, on the device that the model was trained on."""
    names = {"core": "CORE", "offline": "offline tasks", "chat": "ChatCORE", "bits": "bits"}
    cost = _cost(result.seconds, device_name(run), 1, prices)
    name = f"{names[result.kind]} of {result.stage}, step {result.step}"
    return Spending(name, 0.0, result.seconds, 0.0, cost)


def device_name(run: Run) -> str:
    """Return the name of the device that a run trained on."""
    name = lookup(run.config, "hardware", "device")
    return name if isinstance(name, str) else "not recorded"


def device_count(run: Run) -> int:
    """Return how many devices a run trained on."""
    ranks = lookup(run.config, "hardware", "world_size")
    return ranks if isinstance(ranks, int) and ranks > 0 else 1


def _cost(seconds: float, device: str, count: int, prices: Prices) -> float | None:
    hours = seconds * count / 3600
    gpu = find_gpu(device)
    if prices.per_hour is not None:
        return hours * prices.per_hour
    if gpu is None:
        return None
    if gpu.rented:
        return hours * DOLLARS_PER_H100_HOUR * gpu.tflops / H100_TFLOPS
    return hours * gpu.board_watts / 1000 * prices.per_kwh


def describe_prices(run: Run, prices: Prices) -> str:
    """Say what the costs are made of."""
    gpu: Gpu | None = find_gpu(device_name(run))
    if prices.per_hour is not None:
        return f"at ${prices.per_hour:,.2f} an hour for a device"
    if gpu is None:
        return "no price is known of this device: give --price-per-hour"
    if gpu.rented:
        price = DOLLARS_PER_H100_HOUR * gpu.tflops / H100_TFLOPS
        return f"at ${price:,.2f} an hour for a device, assumed from an H100's; --price-per-hour"
    return f"electricity of the card alone, {gpu.board_watts} W at ${prices.per_kwh:.2f} a kWh"
