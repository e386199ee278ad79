"""AdamW against torch's own in float64, and in the narrow types that are stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from archerchat.optim.adamw import adamw_update

EPSILON = 1e-10


def step(
    parameter: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    t: int,
    rate: float = 0.3,
    betas: tuple[float, float] = (0.8, 0.95),
    weight_decay: float = 0.05,
) -> None:
    corrections = (1 - betas[0] ** t, 1 - betas[1] ** t)
    scalars = map(torch.tensor, (rate, weight_decay, *betas, *corrections))
    step = torch.tensor(t, dtype=torch.int32)
    adamw_update(parameter, gradient, *moments, *scalars, step, EPSILON)


def fresh_moments(parameter: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(parameter.shape), torch.zeros(parameter.shape)


@pytest.mark.parametrize("betas", [(0.8, 0.96), (0.8, 0.995), (0.96, 0.95)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_twenty_steps_equal_torchs(betas: tuple[float, float], weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(5, 7, generator=generator)
    exact = torch.nn.Parameter(parameter.double())
    oracle = torch.optim.AdamW([exact], betas=betas, eps=EPSILON, weight_decay=weight_decay)
    moments = fresh_moments(parameter)
    for t in range(1, 21):
        rate = 0.1 / t
        oracle.param_groups[0]["lr"] = rate
        gradient = torch.randn(5, 7, generator=generator) * 10.0 ** (t % 5 - 4)
        gradient[0] = 0  # an embedding's row that no token named
        exact.grad = gradient.double()
        oracle.step()
        step(parameter, gradient, moments, t, rate, betas, weight_decay)
    torch.testing.assert_close(parameter.double(), exact.data, atol=1e-6, rtol=1e-6)
    state = oracle.state[exact]
    for moment, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
        torch.testing.assert_close(moment.double(), state[name], atol=1e-7, rtol=1e-5)


def test_a_bfloat16_parameter_is_stepped_in_float32_and_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(64, 8, generator=generator).bfloat16()
    gradient = torch.randn(64, 8, generator=generator).bfloat16()
    wide, moments, wide_moments = parameter.float(), *(fresh_moments(parameter) for _ in range(2))
    step(parameter, gradient, moments, t=1)
    step(wide, gradient.float(), wide_moments, t=1)
    assert parameter.dtype == torch.bfloat16
    assert torch.equal(parameter, wide.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(moments, wide_moments, strict=True))
    assert all(moment.dtype == torch.float32 for moment in moments)


def test_the_first_step_has_the_size_of_the_rate_whatever_the_gradients() -> None:
    gradient = torch.tensor([1e-4, -3.0, 5e5])
    parameter = torch.ones(3)
    step(parameter, gradient, fresh_moments(parameter), t=1, rate=0.1, weight_decay=0.0)
    torch.testing.assert_close(parameter, torch.tensor([0.9, 1.1, 0.9]))


def test_without_a_gradient_there_is_only_decay() -> None:
    parameter = torch.ones(4)
    step(parameter, torch.zeros(4), fresh_moments(parameter), t=1, rate=0.5, weight_decay=0.1)
    torch.testing.assert_close(parameter, torch.full((4,), 0.95))
