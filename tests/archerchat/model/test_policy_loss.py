"""The policy's loss and gradient, against REINFORCE written out in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from archerchat.model import loss as module
from archerchat.model.config import ModelConfig
from archerchat.model.loss import LOGIT_CAP, weighted_loss
from archerchat.model.transformer import Transformer

CONFIG = ModelConfig(64, 100, 4, 2, 1, 32)
"""Its vocabulary is padded."""


def policy_loss(
    hidden: Tensor, unembedding: Tensor, targets: Tensor, advantages: Tensor, scale: float
) -> Tensor:
    """Weight each trained token by its row's advantage (B,)."""
    weights = advantages[:, None].expand_as(targets)
    return weighted_loss(hidden, unembedding, targets, CONFIG.vocab_size, weights, scale)


def build(dtype: torch.dtype) -> Transformer:
    model = Transformer(CONFIG, dtype, "matmul")
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def naive_gradients(
    inputs: Tensor, targets: Tensor, advantages: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """Return - sum(advantage * log p) / trained tokens, token by token, and its gradients."""
    model = build(torch.float64)
    total, trained = torch.zeros((), dtype=torch.float64), 0
    for row, target, advantage in zip(inputs, targets, advantages, strict=True):
        logits = model.hidden(row[None])[0] @ model.unembedding.weight[: CONFIG.vocab_size].T
        logits = LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)
        for position, token in enumerate(target.tolist()):
            if token != -1:
                trained += 1
                log_probability = torch.log_softmax(logits[position], dim=0)[token]
                total = total - advantage.double() * log_probability
    loss = total / trained
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randint(0, 100, (5, 12), generator=generator)
    targets = torch.randint(0, 100, (5, 12), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.4] = -1
    targets[3] = -1  # a row that chose nothing
    return inputs, targets, torch.tensor([0.75, -0.25, -0.5, 1.0, 0.4])


@pytest.mark.parametrize("chunk", [4096, 7])
def test_the_gradient_is_naive_reinforces(
    batch: tuple[Tensor, Tensor, Tensor], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "chunk_tokens", lambda vocab_size, device: chunk)
    inputs, targets, advantages = batch
    expected, gradients = naive_gradients(inputs, targets, advantages)
    model = build(torch.float32)
    scale = 1 / int((targets != -1).sum())
    loss = policy_loss(model.hidden(inputs), model.unembedding.weight, targets, advantages, scale)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        size = gradients[name].abs().max()
        assert size > 0
        error = (gradient.double() - gradients[name]).abs().max()
        assert error < 1e-4 * size, f"{name}: {error} of {size}"


def test_micro_batches_add_up_to_the_whole(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """Rows in two micro-batches, each scaled by the whole's tokens, averaged as the loop does."""
    inputs, targets, advantages = batch
    _, gradients = naive_gradients(inputs, targets, advantages)
    model, parts = build(torch.float32), [slice(0, 2), slice(2, 5)]
    scale = len(parts) / int((targets != -1).sum())
    for part in parts:
        hidden = model.hidden(inputs[part])
        loss = policy_loss(hidden, model.unembedding.weight, targets[part], advantages[part], scale)
        (loss / len(parts)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            size = gradients[name].abs().max()
            assert (parameter.grad.double() - gradients[name]).abs().max() < 1e-4 * size


def test_without_targets_there_is_neither_loss_nor_gradient() -> None:
    model = build(torch.float32)
    inputs, nothing = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), -1)
    hidden = model.hidden(inputs)
    loss = policy_loss(hidden, model.unembedding.weight, nothing, torch.ones(1), 1.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_small_scales_do_not_lose_float16_gradients() -> None:
    hidden = torch.randn(1, 8, 16, generator=torch.manual_seed(0)).half().requires_grad_()
    weight = torch.randn(100, 16, generator=torch.manual_seed(1)).requires_grad_()
    targets: Any = torch.from_numpy(np.arange(8)[None])
    scale, grown = 2.0**-24, 2.0**16  # what the gradient scaler multiplies by
    loss = policy_loss(hidden, weight, targets, torch.ones(1), scale)
    (loss * grown).backward()  # type: ignore[no-untyped-call]
    plain = hidden.detach().float().requires_grad_()
    other = weight.detach().half().float()
    loss = policy_loss(plain, other, targets, torch.ones(1), scale)
    (loss * grown).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert plain.grad is not None
    assert (hidden.grad.float() - plain.grad).norm() < 0.01 * plain.grad.norm()
    assert hidden.grad.count_nonzero() > 0.95 * hidden.grad.numel()
