"""Weights cast once compute what weights cast at each use do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from archerchat.inference import weights
from archerchat.inference.weights import InferenceModel, PackedLinear, can_pack
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Linear

SHAPE = ModelConfig(64, 100, 2, 2, 2, 64)
IDS = torch.arange(60)[None] % 100


def test_in_float32_the_model_serves_itself(build: Any) -> None:
    model = build(SHAPE)
    assert InferenceModel(model).model is model


def cast_bytes(model: nn.Module) -> set[torch.dtype]:
    return {m.weight.dtype for m in model.modules() if isinstance(m, Linear)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plainly_cast_weights_give_the_same_bits(
    build: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(weights, "can_pack", lambda *_: False)
    model = build(SHAPE, dtype=dtype)
    model.backend = "sdpa"
    for block in model.blocks:
        block.attention.backend = "sdpa"  # float16 has no room for `matmul`
    fixed = InferenceModel(model)
    assert not fixed.packed
    assert cast_bytes(fixed.model) == {dtype}
    assert cast_bytes(model) == {torch.float32}
    assert torch.equal(fixed.model(IDS), model(IDS))
    assert fixed.model.token_embedding.weight is model.token_embedding.weight
    assert fixed.model.device == model.device


@pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="this torch does not pack bfloat16"
)
def test_packed_weights_give_the_same_within_rounding(build: Any) -> None:
    model = build(SHAPE, dtype=torch.bfloat16)
    fixed = InferenceModel(model)
    assert fixed.packed
    assert sum(isinstance(module, PackedLinear) for module in fixed.model.modules()) == 6 * 2 + 1
    torch.testing.assert_close(fixed.model(IDS), model(IDS), atol=0.15, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_a_refresh_takes_new_weights_over(
    build: Any, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    if not packed:
        monkeypatch.setattr(weights, "can_pack", lambda *_: False)
    model, other = build(SHAPE, 0, torch.bfloat16), build(SHAPE, 3, torch.bfloat16)
    fixed = InferenceModel(model)
    before = fixed.model(IDS)
    model.load_state_dict(other.state_dict())
    fixed.refresh()
    assert torch.equal(fixed.model(IDS), InferenceModel(other).model(IDS))
    assert not torch.equal(fixed.model(IDS), before)


def test_nothing_else_is_packed() -> None:
    cpu = torch.device("cpu")
    assert not can_pack(cpu, torch.float32)
    assert not can_pack(cpu, torch.float16)
    assert not can_pack(torch.device("cuda"), torch.bfloat16)
