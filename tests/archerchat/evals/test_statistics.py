"""Intervals and pass@k, against their definitions and figures worked out by hand."""

from __future__ import annotations

from itertools import combinations
from math import sqrt
from random import Random

import pytest

from archerchat.evals.statistics import (
    Z_95,
    centred,
    mean_interval,
    pass_at_k,
    pass_sizes,
    wilson_interval,
)


@pytest.mark.parametrize(("right", "trials"), [(1, 3), (5, 10), (30, 200), (199, 200), (2.5, 7)])
def test_wilsons_limits_are_where_the_score_test_just_rejects(right: float, trials: int) -> None:
    low, high = wilson_interval(right, trials)
    share = right / trials
    assert low < share < high
    for limit in (low, high):
        distance = Z_95 * sqrt(limit * (1 - limit) / trials)
        assert abs(share - limit) == pytest.approx(distance, rel=1e-9)


def test_wilson_at_the_ends() -> None:
    assert wilson_interval(0, 10) == (0.0, pytest.approx(0.277533, abs=1e-6))
    assert wilson_interval(10, 10) == (pytest.approx(0.722467, abs=1e-6), 1.0)
    assert wilson_interval(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_pass_at_k_is_the_mean_over_every_choice_of_k_samples(k: int) -> None:
    random = Random(k)
    outcomes = [[random.random() < share for _ in range(5)] for share in (0, 0.2, 0.6, 1)]
    shares = []
    for samples in outcomes:
        choices = list(combinations(samples, k))
        shares.append(sum(any(choice) for choice in choices) / len(choices))
    found = pass_at_k([sum(samples) for samples in outcomes], 5, k)
    assert found == pytest.approx(sum(shares) / len(shares), abs=1e-12)


@pytest.mark.parametrize(
    ("samples", "sizes"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (16, [1, 2, 4, 8, 16])]
)
def test_sizes_to_report(samples: int, sizes: list[int]) -> None:
    assert pass_sizes(samples) == sizes


def test_centred() -> None:
    assert centred(0.25, 0.25) == 0
    assert centred(1.0, 0.25) == 1
    assert centred(0.625, 0.25) == 0.5
    assert centred(0.1, 0.0) == 0.1


def test_the_interval_of_a_mean() -> None:
    assert mean_interval([0.3], [(0.1, 0.6)]) == pytest.approx((0.1, 0.6))
    # Equal intervals shrink by the square root of their number, each side on its own.
    low, high = mean_interval([0.5, 0.5, 0.5, 0.5], [(0.3, 0.6)] * 4)
    assert (low, high) == pytest.approx((0.4, 0.55))
