"""The model on each kind of device: attention against float64, and the goldens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from archerchat.exchange.nanochat import to_archerchat_names
from archerchat.model import attention
from archerchat.model.attention import attend, choose_backend, prepare_mask
from archerchat.model.compiling import compiled
from archerchat.model.loss import LossKernels, token_losses, weighted_loss
from archerchat.model.transformer import Regions, Transformer

pytestmark = pytest.mark.filterwarnings("error::archerchat.model.compiling.CompileWarning")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ["sdpa", "matmul", "flex", "varlen", "flash"]
SHAPES = [(256, 64, 4, 2), (300, 299, 2, 2), (513, 0, 2, 1)]
"""T, window, H, K."""
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative errors; float32 may use TF32."""


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Float32 without TF32, whatever a run before set; graphs of this test only."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.compiler.reset()
    yield
    torch.set_float32_matmul_precision(before)


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative distance of two tensors."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def exact_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attend in float64 to the keys that `seen` (..., T, T) lets through."""
    groups = q.size(2) // k.size(2)
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ k.mT / math.sqrt(q.size(3))).masked_fill(~seen, -torch.inf)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def draw(length: int, heads: int, kv_heads: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v and a gradient for the output: normalised, as the model's are."""
    generator = torch.Generator().manual_seed(length)
    sizes = (heads, kv_heads, kv_heads, heads)
    drawn = [torch.randn(2, length, n, 64, generator=generator) for n in sizes]
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def require(backend: str, device: str, dtype: torch.dtype) -> None:
    """Skip what does not run here."""
    if backend in ("flash", "varlen") and (device == "cpu" or dtype == torch.float32):
        pytest.skip(f"{backend} needs CUDA and 16 bits")
    if backend == "flex" and device == "cpu":
        pytest.skip("flex has no gradients on CPUs")
    if backend == "matmul" and dtype == torch.float16:
        pytest.skip("matmul overflows in float16")
    if backend == "flash" and attention.flash_module(torch.device(device), dtype) is None:
        pytest.skip("no flash_attn for this device")


def assert_attends(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Compare output and gradients."""
    *given, upstream = inputs
    bound = TOLERANCES[actual.dtype]
    assert error(actual, expected) < bound
    gradients = torch.autograd.grad(actual, given, upstream)
    exact = torch.autograd.grad(expected, given, upstream.double())
    for gradient, wanted in zip(gradients, exact, strict=True):
        assert wanted.norm() == 0 or error(gradient, wanted) < 2 * bound


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
def test_attention_equals_float64(
    device: str, backend: Any, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    require(backend, device, dtype)
    length, window, heads, kv_heads = shape
    inputs = draw(length, heads, kv_heads, device, dtype)
    q, k, v, _ = inputs
    mask = prepare_mask(length, window, q.device, backend)
    function = compiled(attend) if backend == "flex" else attend
    actual = function(q, k, v, window, backend, mask)
    ages = torch.arange(length)[:, None] - torch.arange(length)
    seen = ((ages >= 0) & (ages <= window)).to(device)
    assert_attends(actual, exact_attention(q, k, v, seen), inputs)


@pytest.mark.parametrize("window", [50, 299])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
def test_new_tokens_see_those_before_them(device: str, backend: Any, window: int) -> None:
    """Uncompiled, as prompts run after a prefix; `flex` hands this to `varlen`."""
    if backend != "flex":
        require(backend, device, torch.bfloat16)
    inputs = draw(300, 4, 2, device, torch.bfloat16)
    inputs = [inputs[0][:, 200:], *inputs[1:3], inputs[3][:, 200:]]
    actual = attend(*inputs[:3], window, backend)
    ages = torch.arange(300)[:, None] - torch.arange(300)
    seen = ((ages >= 0) & (ages <= window)).to(device)[200:]
    assert_attends(actual, exact_attention(*inputs[:3], seen), inputs)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("device", DEVICES)
def test_documents_are_kept_apart_without_compiling_for_each_batch(
    device: str, backend: Any
) -> None:
    require(backend, device, torch.bfloat16)
    function = compiled(attend) if backend == "flex" else attend
    ages = torch.arange(256)[:, None] - torch.arange(256)
    band = ((ages >= 0) & (ages <= 100)).to(device)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        starts = torch.rand(2, 256, generator=generator) < 0.03
        segments = starts.cumsum(1).to(device)
        inputs = draw(256, 2, 2, device, torch.bfloat16)
        mask = prepare_mask(segments.size(1), 100, segments.device, backend, segments)
        stance = "fail_on_recompile" if seed and backend == "flex" else "default"
        with torch.compiler.set_stance(stance):
            actual = function(*inputs[:3], 100, backend, mask, segments)
        same = (segments[:, None, :, None] == segments[:, None, None, :]) & band
        assert_attends(actual, exact_attention(*inputs[:3], same), inputs)


def on_device(golden: Any, device: str, backend: Any, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Return a golden's model on a device, with what runs it: compiled on CUDA."""
    model = golden.build(dtype, backend).to(device)
    fast = device == "cuda"
    regions = Regions.compiled() if fast else Regions()
    return model, regions, LossKernels.compiled() if fast else LossKernels()


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("device", DEVICES)
def test_goldens_in_float32(load_model_golden: Any, device: str, backend: Any) -> None:
    require(backend, device, torch.float32)
    golden = load_model_golden("model_a")
    model, regions, kernels = on_device(golden, device, backend, torch.float32)
    ids, targets = (golden.io[name].to(device) for name in ("ids", "targets"))
    hidden = model.hidden(ids, regions)
    logits = model.logits(hidden)[0, golden.io["logits_positions"].to(device)]
    torch.testing.assert_close(logits.cpu(), golden.io["logits_row0"], atol=1e-3, rtol=1e-3)
    size = golden.config.vocab_size
    losses = token_losses(hidden.detach(), model.unembedding.weight, targets, size, kernels)
    torch.testing.assert_close(losses.cpu(), golden.io["per_position_loss"], atol=2e-4, rtol=1e-4)
    loss = weighted_loss(hidden, model.unembedding.weight, targets, size, kernels=kernels)
    assert loss.item() == pytest.approx(golden.facts["mean_loss"], rel=1e-5)
    loss.backward()
    stats = to_archerchat_names(golden.facts["grad_stats"])
    for name, parameter in model.named_parameters():
        norm = parameter.grad.double().norm().item()
        bound = 1e-2 if name == "smear_lambda" else 2e-3  # a sum of terms that nearly cancel
        assert norm == pytest.approx(stats[name]["l2"], rel=bound), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.slow
def test_goldens_in_16_bits(load_model_golden: Any, device: str, dtype: torch.dtype) -> None:
    golden = load_model_golden("model_a")
    backend, _ = choose_backend(torch.device(device), dtype)
    model, regions, kernels = on_device(golden, device, backend, dtype)
    ids, targets = (golden.io[name].to(device) for name in ("ids", "targets"))
    hidden = model.hidden(ids, regions)
    assert hidden.dtype == dtype
    size = golden.config.vocab_size
    loss = weighted_loss(hidden, model.unembedding.weight, targets, size, kernels=kernels)
    assert loss.item() == pytest.approx(golden.facts["mean_loss"], abs=6e-3)
    (loss * 1024).backward()
    exact = golden.build()
    exact_loss = weighted_loss(
        exact.hidden(golden.io["ids"]), exact.unembedding.weight, golden.io["targets"], size
    )
    exact_loss.backward()
    pairs = zip(model.parameters(), exact.parameters(), strict=True)
    errors = [error(a.grad.cpu() / 1024, b.grad) for a, b in pairs if b.numel() > 4096]
    assert max(errors) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
def test_a_model_keeps_packed_documents_apart(load_model_golden: Any, device: str) -> None:
    golden = load_model_golden("model_a")
    backend = "sdpa" if device == "cpu" else "flex"
    model, regions, _ = on_device(golden, device, backend, torch.float32)
    ids = golden.io["ids"].to(device)
    starts = torch.zeros_like(ids)
    starts[:, [0, 100, 130]] = 1
    packed = model.hidden(ids, regions, segments=starts.cumsum(1))
    plain = golden.build(backend="sdpa").to(device)
    for first, stop in ((0, 100), (100, 130), (130, 256)):
        alone = plain.hidden(ids[:, first:stop])
        assert error(packed[:, first:stop], alone) < 2e-3


@pytest.mark.gpu
def test_the_choice_on_cuda() -> None:
    backend, _ = choose_backend(torch.device("cuda"), torch.bfloat16)
    assert backend in ("flex", "flash")


@pytest.mark.gpu
def test_flex_in_plain_code_computes_as_sdpa_on_cuda(load_model_golden: Any) -> None:
    golden = load_model_golden("model_a")
    ids = golden.io["ids"].cuda()
    models = [golden.build(torch.bfloat16, backend).cuda() for backend in ("flex", "sdpa")]
    plain = [model.hidden(ids).detach() for model in models]
    assert torch.equal(*plain)
    assert isinstance(models[0], Transformer)
