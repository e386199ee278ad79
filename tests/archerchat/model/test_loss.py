"""The chunked loss against plain float64 cross-entropy, its range, and its memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from archerchat.model import loss as loss_module
from archerchat.model.loss import (
    LossKernels,
    chunk_tokens,
    token_losses,
    weighted_loss,
)

CPU = torch.device("cpu")
VOCAB, PADDED = 300, 320


def draw(
    rows: int = 3, length: int = 50, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states and an unembedding that ask for gradients, and targets, 15 % of them -1.

    Logits have a deviation of about 8, so that the cap of 15 matters.
    """
    generator = torch.Generator().manual_seed(rows * length)
    hidden = torch.randn(rows, length, 32, generator=generator).to(device, dtype)
    unembedding = (1.4 * torch.randn(PADDED, 32, generator=generator)).to(device)
    targets = torch.randint(VOCAB, (rows, length), generator=generator)
    targets[torch.rand(rows, length, generator=generator) < 0.15] = -1
    return hidden.requires_grad_(), unembedding.requires_grad_(), targets.to(device)


def plain(hidden: Tensor, unembedding: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Compute the loss of SPEC section 2 in float64 from all logits at once."""
    logits = 15 * torch.tanh(hidden.double() @ unembedding[:VOCAB].double().T / 15)
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def assert_is_plain(
    hidden: Tensor, unembedding: Tensor, targets: Tensor, tolerance: float, **options: Any
) -> None:
    """Compare the loss and both gradients with the plain ones."""
    loss = weighted_loss(hidden, unembedding, targets, VOCAB, **options)
    expected = plain(hidden, unembedding, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    gradients = torch.autograd.grad(loss, (hidden, unembedding))
    wide = [x.detach().double().requires_grad_() for x in (hidden, unembedding)]
    exact = torch.autograd.grad(plain(*wide, targets), wide)
    for gradient, wanted, like in zip(gradients, exact, (hidden, unembedding), strict=True):
        assert gradient.dtype == like.dtype
        assert relative_error(gradient, wanted) < tolerance


def test_float32_gradients_are_those_of_a_plain_cross_entropy_bit_for_bit() -> None:
    """What rounding leaves of a vanishing gradient decides where Adam's first steps go."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(64, 32, generator=generator).requires_grad_()
    unembedding = (0.01 * torch.randn(VOCAB, 32, generator=generator)).requires_grad_()
    targets = torch.randint(VOCAB, (64,), generator=generator)
    logits = 15 * torch.tanh(F.linear(hidden, unembedding) / 15)
    wanted = torch.autograd.grad(F.cross_entropy(logits, targets), (hidden, unembedding))
    loss = weighted_loss(hidden[None], unembedding, targets[None], VOCAB)
    actual = torch.autograd.grad(loss, (hidden, unembedding))
    assert torch.equal(actual[0], wanted[0])
    assert torch.allclose(actual[1], wanted[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("chunk", [1, 7, 50, 64, 149, 150, 1000])
def test_loss_and_gradients_do_not_depend_on_the_chunk(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "chunk_tokens", lambda vocab_size, device: chunk)
    hidden, unembedding, targets = draw()
    assert_is_plain(hidden, unembedding, targets, 1e-5)
    losses = token_losses(hidden, unembedding, targets, VOCAB)
    expected = plain(hidden, unembedding, targets, "none").view(3, 50)
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)
    assert not losses.requires_grad
    assert not losses[targets == -1].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_narrow_hidden_states(dtype: torch.dtype, tolerance: float) -> None:
    assert_is_plain(*draw(dtype=dtype), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [50, 171, 200])
def test_narrow_hidden_states_on_a_gpu(length: int) -> None:
    assert_is_plain(*draw(length=length, device="cuda"), 1e-4)
    hidden, unembedding, targets = draw(length=length, dtype=torch.bfloat16, device="cuda")
    assert_is_plain(hidden, unembedding, targets, 0.02)
    # The mean's factor must not be rounded to bfloat16: that would scale all of a gradient alike.
    loss = weighted_loss(hidden, unembedding, targets, VOCAB)
    (gradient,) = torch.autograd.grad(loss, hidden)
    wide = hidden.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(plain(wide, unembedding, targets), wide)
    projection = (gradient.double() * exact).sum() / exact.square().sum()
    assert projection.item() == pytest.approx(1, abs=1e-3)


def test_chunks_stay_within_their_budget() -> None:
    for vocab_size in (300, 4096, 32768):
        assert chunk_tokens(vocab_size, CPU) * vocab_size * 4 <= 16 * 2**20
        small = chunk_tokens(vocab_size, torch.device("cuda"), 12 * 2**30)
        assert small * vocab_size * 4 <= 256 * 2**20
    assert chunk_tokens(32768, torch.device("cuda"), 80 * 2**30) == 8192
    assert chunk_tokens(2**22, CPU) == 128  # never so few that the products starve


def test_the_unscaled_upstream_gradient_is_applied_once() -> None:
    hidden, unembedding, targets = draw()
    loss = weighted_loss(hidden, unembedding, targets, VOCAB)
    once = torch.autograd.grad(loss, (hidden, unembedding), retain_graph=True)
    half = torch.autograd.grad(loss / 2, (hidden, unembedding))
    for whole, part in zip(once, half, strict=True):
        torch.testing.assert_close(part, whole / 2)


def test_padding_rows_get_no_gradient_and_give_no_probability() -> None:
    hidden, unembedding, targets = draw()
    loss = weighted_loss(hidden, unembedding, targets, VOCAB)
    (gradient,) = torch.autograd.grad(loss, unembedding)
    assert gradient.shape == unembedding.shape
    assert not gradient[VOCAB:].any()
    assert gradient[:VOCAB].any(dim=1).all()
    with torch.no_grad():
        unembedding[VOCAB:] = 100.0
    assert weighted_loss(hidden, unembedding, targets, VOCAB).item() == loss.item()


def test_nothing_to_predict_is_a_loss_of_zero() -> None:
    hidden, unembedding, targets = draw()
    loss = weighted_loss(hidden, unembedding, torch.full_like(targets, -1), VOCAB)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (hidden, unembedding)):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert not token_losses(hidden, unembedding, torch.full_like(targets, -1), VOCAB).any()


def test_ignored_positions_get_no_gradient() -> None:
    hidden, unembedding, targets = draw()
    (gradient,) = torch.autograd.grad(weighted_loss(hidden, unembedding, targets, VOCAB), hidden)
    assert not gradient[targets == -1].any()
    assert gradient[targets != -1].any(dim=1).all()


@pytest.mark.parametrize("size", [1_000.0, 1e30])
def test_extreme_logits_are_capped(size: float) -> None:
    unembedding = torch.full((PADDED, 1), -size).requires_grad_()
    with torch.no_grad():
        unembedding[0] = size
    hidden = torch.ones(1, 2, 1, requires_grad=True)
    targets = torch.tensor([[0, 1]])  # certain and right; certain and wrong
    losses = token_losses(hidden, unembedding, targets, VOCAB)
    right = math.log1p((VOCAB - 1) * math.exp(-30))
    assert losses[0, 0].item() == pytest.approx(right, abs=2e-6)
    assert losses[0, 1].item() == pytest.approx(30 + right, abs=1e-5)
    loss = weighted_loss(hidden, unembedding, targets, VOCAB)
    assert loss.item() == pytest.approx(15 + right, abs=1e-5)
    for gradient in torch.autograd.grad(loss, (hidden, unembedding)):
        assert not gradient.any(), "the cap is flat there"


def test_float16_gradients_survive_when_the_loss_is_scaled() -> None:
    hidden, unembedding, targets = draw(8, 500, torch.float16)
    with torch.no_grad():
        unembedding *= 0.0007  # about the initial values
    wide = [x.detach().double().requires_grad_() for x in (hidden, unembedding)]
    exact = torch.autograd.grad(plain(*wide, targets), wide)
    assert relative_error(exact[0].half(), exact[0]) > 0.05, "unscaled, float16 would lose them"
    scale = 2.0**16
    loss = weighted_loss(hidden, unembedding, targets, VOCAB)
    for gradient, wanted in zip(
        torch.autograd.grad(loss * scale, (hidden, unembedding)), exact, strict=True
    ):
        assert gradient.isfinite().all()
        assert relative_error(gradient.double() / scale, wanted) < 0.003


class LargestTensor(TorchDispatchMode):
    """Record the most elements that any operation's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // 4)
        return out


def test_all_logits_never_exist_at_once() -> None:
    rows, length, vocab_size = 4, 512, 4096
    hidden = torch.randn(rows, length, 16, requires_grad=True)
    unembedding = torch.randn(vocab_size, 16, requires_grad=True)
    targets = torch.randint(vocab_size, (rows, length))
    chunk = chunk_tokens(vocab_size, CPU) * vocab_size
    assert chunk <= rows * length * vocab_size // 4
    with LargestTensor() as training:
        weighted_loss(hidden, unembedding, targets, vocab_size).backward()
    with LargestTensor() as evaluation:
        token_losses(hidden, unembedding, targets, vocab_size)
    assert training.elements == evaluation.elements == chunk


@pytest.mark.slow
def test_compiled_kernels_compute_what_the_plain_ones_do() -> None:
    torch.compiler.reset()
    kernels = LossKernels.compiled()
    hidden, unembedding, targets = draw()
    assert_is_plain(hidden, unembedding, targets, 1e-5, kernels=kernels)
    fast = token_losses(hidden, unembedding, targets, VOCAB, kernels)
    torch.testing.assert_close(fast, token_losses(hidden, unembedding, targets, VOCAB))
