"""Speed figures: the median of the steps after the warm-up, and what follows from it."""

from __future__ import annotations

import math

import pytest

from archerchat.training.state import RECENT_STEPS, WARMUP_STEPS, Speed


def timed(*seconds: float) -> Speed:
    """Steps of 100 tokens and 50 operations each, on a device that does 1000 a second."""
    count = len(seconds)
    return Speed(1000, list(seconds), tokens=100 * count, flops=50 * count)


def figures(speed: Speed) -> tuple[float, float, float]:
    return speed.tokens_per_second, speed.mfu, speed.data_wait_share


def test_the_rate_is_the_median_step_s_after_the_warm_up() -> None:
    speed = timed(*[9.0] * WARMUP_STEPS, 0.5, 7.0, 0.25)
    speed.wait_seconds = 5.275
    assert figures(speed) == pytest.approx((200.0, 0.1, 0.1))


def test_a_call_without_a_steady_step_says_what_it_can() -> None:
    assert figures(timed(2.0, 0.5)) == (50.0, 0.025, 0.0)
    nothing = timed()
    assert math.isnan(nothing.tokens_per_second)
    assert math.isnan(nothing.mfu)
    assert nothing.data_wait_share == 0.0


def test_the_time_left_is_told_from_recent_steady_steps() -> None:
    assert timed(*[9.0] * WARMUP_STEPS).seconds_left(3) is None
    assert timed(*[9.0] * WARMUP_STEPS).seconds_left(0) == 0.0
    assert timed(*[9.0] * (WARMUP_STEPS + 200), *[0.5] * RECENT_STEPS).seconds_left(3) == 1.5
