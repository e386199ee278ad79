"""Muon against a naive float64 version that works on one matrix and its singular values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from archerchat.optim.muon import (
    POLAR_EXPRESS,
    muon_update,
    orthogonalize,
    variance_shape,
)

SHAPES = [(1, 2, 12), (3, 8, 8), (2, 32, 8), (2, 8, 32), (4, 5, 6)]


def naive_orthogonalize(g: Tensor) -> Tensor:
    """Apply each step's odd polynomial to the singular values of one matrix."""
    u, s, vt = torch.linalg.svd(g / (1.01 * g.norm() + 1e-6), full_matrices=False)
    for a, b, c in POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


def naive_update(
    p: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    rate: float,
    decay: float,
    mu: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return one matrix, its momentum and its variances after SPEC section 3's six items."""
    rows, columns = p.shape
    m = mu * m + (1 - mu) * gradient
    g = (1 - mu) * gradient + mu * m
    g = torch.stack([row * g.norm() / math.sqrt(rows) / max(row.norm(), 1e-6) for row in g])
    g = naive_orthogonalize(g)
    g = g * math.sqrt(min(rows, columns)) / g.norm()
    v = 0.9 * v + 0.1 * (g**2).mean(1 if rows >= columns else 0, keepdim=True)
    scaled = g / v.clamp(min=1e-10).sqrt()
    g = scaled * g.norm() / scaled.norm()
    rate = rate * math.sqrt(max(1, rows / columns))
    return p - rate * g - rate * decay * p * (g * p >= 0), m, v


def stack(shape: tuple[int, int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def buffers(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    return torch.zeros(shape), torch.zeros(variance_shape(torch.Size(shape)))


def update(
    parameters: Tensor,
    gradients: Tensor,
    state: tuple[Tensor, Tensor],
    rate: float = 0.02,
    decay: float = 0.2,
    momentum: float = 0.95,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    scalars = map(torch.tensor, (rate, decay, momentum))
    result: Any = muon_update(parameters, gradients, *state, *scalars, dtype)
    return result


@pytest.mark.parametrize("shape", SHAPES)
def test_five_steps_equal_the_naive_ones(shape: tuple[int, int, int]) -> None:
    parameters, state = stack(shape, 0), buffers(shape)
    naive = [
        (p, m, v)
        for p, m, v in zip(parameters.double(), *(x.double().clone() for x in state), strict=True)
    ]
    for i in range(1, 6):
        gradients = stack(shape, i) * 10.0 ** (i - 3)
        values = (0.02 / i, 0.3 / i, 0.8 + 0.03 * i)
        parameters = update(parameters, gradients, state, *values)
        naive = [
            naive_update(p, g, m, v, *values)
            for (p, m, v), g in zip(naive, gradients.double(), strict=True)
        ]
    for actual, expected in zip((parameters, *state), zip(*naive, strict=True), strict=True):
        torch.testing.assert_close(actual.double(), torch.stack(expected), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalized_matrices_have_singular_values_near_one(
    shape: tuple[int, int, int],
) -> None:
    g = stack(shape, 0)
    out = orthogonalize(g)
    torch.testing.assert_close(
        out.double(), torch.stack([naive_orthogonalize(x) for x in g.double()]), atol=1e-5, rtol=0
    )
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.7
    assert values.max() < 1.2
    assert orthogonalize(g.bfloat16()).dtype == torch.bfloat16


def test_a_zero_gradient_gives_a_zero_update() -> None:
    for shape in SHAPES:
        parameters, gradients, state = stack(shape, 0), torch.zeros(shape), buffers(shape)
        assert torch.equal(update(parameters, gradients, state, decay=0.0), parameters)
        assert not any(buffer.any() for buffer in state)
        # Decay counts a product of zero as agreement, so it alone is left.
        rate = 0.02 * math.sqrt(max(1, shape[1] / shape[2]))
        decayed = update(parameters, gradients, state, decay=0.5)
        torch.testing.assert_close(decayed, parameters * (1 - rate * 0.5))


def test_one_zero_matrix_does_not_disturb_its_stack() -> None:
    shape = (3, 8, 6)
    gradients = stack(shape, 1)
    gradients[1] = 0
    parameters = stack(shape, 0)
    both = update(parameters, gradients, buffers(shape))
    alone = update(parameters[[0, 2]], gradients[[0, 2]], buffers((2, 8, 6)))
    torch.testing.assert_close(both[[0, 2]], alone)
    assert both.isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12])
def test_gradients_of_any_size_are_finite_updates(size: float) -> None:
    shape = (2, 8, 6)
    parameters, state = stack(shape, 0), buffers(shape)
    for i in range(3):
        parameters = update(parameters, stack(shape, i) * size, state)
        assert all(x.isfinite().all() for x in (parameters, *state))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_updates_size_depends_on_shape_and_rate_alone(shape: tuple[int, int, int]) -> None:
    parameters, gradients = stack(shape, 0), stack(shape, 1)
    first = parameters - update(parameters, gradients, buffers(shape), decay=0.0)
    scaled = parameters - update(parameters, 1000 * gradients, buffers(shape), decay=0.0)
    torch.testing.assert_close(first, scaled, atol=1e-6, rtol=1e-4)
    _, rows, columns = shape
    size = 0.02 * math.sqrt(max(1, rows / columns)) * math.sqrt(min(rows, columns))
    torch.testing.assert_close(torch.linalg.matrix_norm(first), torch.full((shape[0],), size))


def test_decay_acts_only_where_it_agrees_with_the_update() -> None:
    shape = (2, 16, 16)
    parameters, gradients = stack(shape, 0), stack(shape, 1)
    plain = update(parameters, gradients, buffers(shape), decay=0.0)
    decayed = update(parameters, gradients, buffers(shape), decay=0.5)
    shrinks = (parameters - plain) * parameters >= 0
    assert 0.3 < shrinks.float().mean() < 0.7
    assert torch.equal(decayed[~shrinks], plain[~shrinks])
    torch.testing.assert_close((plain - decayed)[shrinks], 0.02 * 0.5 * parameters[shrinks])


def test_bfloat16_is_close_and_returns_float32() -> None:
    shape = (3, 32, 16)
    parameters, gradients = stack(shape, 0), stack(shape, 1)
    exact = parameters - update(parameters, gradients, buffers(shape), decay=0.0)
    state = buffers(shape)
    out = update(parameters, gradients, state, decay=0.0, dtype=torch.bfloat16)
    assert {out.dtype, *(x.dtype for x in state)} == {torch.float32}
    difference = (parameters - out) - exact
    assert 0 < (torch.linalg.matrix_norm(difference) / torch.linalg.matrix_norm(exact)).max() < 0.1


def test_variances_are_kept_along_the_longer_side() -> None:
    assert variance_shape(torch.Size((3, 8, 2))) == (3, 8, 1)
    assert variance_shape(torch.Size((3, 2, 8))) == (3, 1, 8)
    assert variance_shape(torch.Size((3, 8, 8))) == (3, 8, 1)
