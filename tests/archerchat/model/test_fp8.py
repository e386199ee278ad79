"""8-bit products against float64, which layers take them, and when."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from archerchat.model import fp8
from archerchat.model.compiling import compiled
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Linear, Transformer

CONFIG = ModelConfig(64, 300, 2, 2, 1, 128, "L")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return in float64 what is left of x in 8 bits, by the definition: one scale per tensor."""
    scale = x.abs().max().float() / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype).double() * scale


@pytest.mark.parametrize(
    "function", [fp8.linear, pytest.param(compiled(fp8.linear), marks=pytest.mark.slow)]
)
def test_the_three_products_are_those_of_the_rounded_tensors(
    function: Callable[[Tensor, Tensor], Tensor],
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 48, 256, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(128, 256, generator=generator) / 16).requires_grad_()
    upstream = torch.randn(2, 48, 128, generator=generator).bfloat16()
    y = function(x, weight)
    y.backward(upstream)
    assert x.grad is not None
    assert weight.grad is not None
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (x.dtype, x.dtype, torch.float32)
    x8, w8 = (rounded(t.detach(), torch.float8_e4m3fn) for t in (x, weight))
    g8 = rounded(upstream, torch.float8_e5m2)
    exact = x8 @ w8.T, g8 @ w8, g8.flatten(0, 1).T @ x8.flatten(0, 1)
    for actual, expected in zip((y, x.grad, weight.grad), exact, strict=True):
        assert relative_error(actual, expected) < 3e-3  # bfloat16's rounding of the result
    assert relative_error(y, x.detach().double() @ weight.detach().double().T) < 0.045
    assert relative_error(x.grad, upstream.double() @ weight.detach().double()) < 0.07


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_values_of_any_size_stay_finite(scale: float) -> None:
    x = scale * torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    weight = torch.eye(128).requires_grad_()
    fp8.linear(x.bfloat16(), weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_gates_small_layers_and_the_unembedding_are_left_alone() -> None:
    model = Transformer(ModelConfig(64, 300, 2, 2, 1, 128, "L"))
    model.use_fp8(True)
    used = {
        name for name, layer in model.named_modules() if isinstance(layer, Linear) and layer.fp8
    }
    assert used == {
        f"blocks.{i}.{name}"
        for i in range(2)
        for name in ("attention.query", "attention.output", "mlp.up", "mlp.down")
    }  # keys and values have 64 outputs
    model.use_fp8(False)
    assert not any(layer.fp8 for layer in model.modules() if isinstance(layer, Linear))


def test_evaluation_never_rounds_and_training_does() -> None:
    model = Transformer(CONFIG)
    model.init_weights(0)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.output.weight.normal_(0, 0.05)  # type: ignore[union-attr,operator]
    ids = torch.arange(64)[None]
    with torch.no_grad():
        expected = model(ids)
        model.use_fp8(True)
        assert torch.equal(model(ids), expected)
    logits = model(ids)
    assert not torch.equal(logits, expected)
    assert relative_error(logits, expected) < 0.05
    logits.logsumexp(-1).mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
