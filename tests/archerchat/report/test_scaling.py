"""Laws recovered from points that follow them."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from archerchat.errors import UsageError
from archerchat.report.scaling import Law, fit_law, optimal_split

CHINCHILLA = Law(1.69, (406.4, 410.7), (0.34, 0.28))
"""Hoffmann et al. 2022, equation 10."""
GRID = list(product((1e7, 3e7, 1e8, 3e8, 1e9), (2e8, 1e9, 4e9, 2e10)))


def sizes() -> list[list[float]]:
    return [[n for n, _ in GRID], [d for _, d in GRID]]


def test_a_known_law_is_recovered() -> None:
    law = fit_law(CHINCHILLA.predict(*map(np.array, sizes())).tolist(), sizes())
    assert law.floor == pytest.approx(1.69, rel=1e-6)
    assert law.factors == pytest.approx((406.4, 410.7), rel=1e-5)
    assert law.exponents == pytest.approx((0.34, 0.28), rel=1e-6)


def test_one_outlier_and_noise_hardly_move_it() -> None:
    noise = np.random.default_rng(0).normal(0, 0.001, len(GRID))
    losses = CHINCHILLA.predict(*map(np.array, sizes())) * np.exp(noise)
    losses[7] *= 1.2
    law = fit_law(losses.tolist(), sizes())
    assert law.floor == pytest.approx(1.69, rel=0.05)
    assert law.exponents == pytest.approx((0.34, 0.28), rel=0.06)


def test_fewer_terms() -> None:
    compute = [1e16, 1e17, 1e18, 1e19]
    law = fit_law([0.6 + 30 / c**0.1 for c in compute], [compute])
    assert (law.floor, *law.factors, *law.exponents) == pytest.approx((0.6, 30, 0.1), rel=1e-6)
    plain = fit_law([30 / c**0.1 for c in compute[:2]], [compute[:2]], floor=False)
    assert plain.floor is None
    assert (*plain.factors, *plain.exponents) == pytest.approx((30, 0.1), rel=1e-9)


def test_leaving_one_out_shows_what_rests_on_it() -> None:
    compute = [1e16, 1e17, 1e18, 1e19, 1e20]
    losses = [0.6 + 30 / c**0.1 for c in compute]
    laws = fit_law(losses, [compute]).without_one
    assert len(laws) == 5
    assert [law.floor for law in laws] == pytest.approx([0.6] * 5, rel=1e-4)
    losses[4] *= 1.05
    floors = [law.floor for law in fit_law(losses, [compute]).without_one]
    assert floors[4] == pytest.approx(0.6, rel=1e-4)
    assert floors[0] != pytest.approx(0.6, rel=1e-2)
    assert fit_law(losses[:3], [compute[:3]]).without_one == ()


def test_the_best_split_is_the_least_loss() -> None:
    flops = 1e21
    parameters, tokens = optimal_split(CHINCHILLA, flops)
    assert 6 * parameters * tokens == pytest.approx(flops)
    best = float(CHINCHILLA.predict(parameters, tokens))
    for factor in (0.9, 1.1):
        moved = parameters * factor
        assert float(CHINCHILLA.predict(moved, flops / 6 / moved)) > best


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 5"):
        fit_law([1.0] * 4, [[1.0] * 4, [1.0] * 4])
    with pytest.raises(UsageError, match="positive"):
        fit_law([1.0, math.nan, 1.0], [[1.0, 2.0, 3.0]])
