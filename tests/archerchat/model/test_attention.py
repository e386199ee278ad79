"""Every attention backend against a naive float64 attention, the choice of one, and its cost."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from collections.abc import Collection
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archerchat.model import attention
from archerchat.model.attention import (
    MATMUL_MAX_KEYS,
    Backend,
    attend,
    choose_backend,
    prepare_mask,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# (T, window, H, K): single tokens, windows of nothing, of all but one, beyond the row; rows that
# are no multiple of a block; more queries than one block, and than eight of the smallest.
SHAPES = [
    (1, 0, 2, 2),
    (1, 5, 4, 2),
    (7, 0, 2, 1),
    (7, 1, 4, 2),
    (128, 128, 2, 2),
    (129, 1, 2, 2),
    (200, 64, 4, 2),
    (200, 198, 4, 1),
    (200, 199, 2, 2),
    (200, 500, 4, 2),
    (300, 10, 2, 1),
    (1100, 130, 2, 1),
]


def naive(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attend as SPEC section 2 says, in float64; shapes as in `attend`."""
    groups = q.size(2) // k.size(2)
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    age = torch.arange(q.size(2))[:, None] - torch.arange(q.size(2))
    hidden = ((age < 0) | (age > window)).to(q.device)
    scores = (q @ k.mT / math.sqrt(q.size(3))).masked_fill(hidden, -torch.inf)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def draw(length: int, heads: int, kv_heads: int, **options: Any) -> list[Tensor]:
    """Return q, k, v and a gradient for the output, batch 2, head dimension 16."""
    generator = torch.Generator().manual_seed(length + heads)
    sizes = (heads, kv_heads, kv_heads, heads)
    drawn = [torch.randn(2, length, n, 16, generator=generator) for n in sizes]
    return [x.to(**options).requires_grad_() for x in drawn]


def assert_attends(
    backend: Any, shape: tuple[int, int, int, int], tolerance: float, **options: Any
) -> None:
    """Compare output and gradients with the naive ones."""
    length, window, heads, kv_heads = shape
    q, k, v, upstream = draw(length, heads, kv_heads, **options)
    mask = prepare_mask(length, window, q.device, backend)
    actual = attend(q, k, v, window, backend, mask)
    assert actual.shape == q.shape
    assert actual.dtype == q.dtype
    expected = naive(q, k, v, window)
    results = [(actual, expected)]
    gradients = torch.autograd.grad(actual, (q, k, v), upstream)
    results += zip(
        gradients, torch.autograd.grad(expected, (q, k, v), upstream.double()), strict=True
    )
    for result, wanted in results:
        torch.testing.assert_close(
            result.double(), wanted.double(), atol=tolerance, rtol=tolerance, check_dtype=False
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_output_and_gradients_equal_the_naive_ones(
    backend: str, shape: tuple[int, int, int, int]
) -> None:
    assert_attends(backend, shape, 1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_bfloat16_stays_bfloat16(backend: str) -> None:
    assert_attends(backend, (200, 64, 4, 2), 0.05, dtype=torch.bfloat16)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("shape", SHAPES[2:])
def test_flex_is_given_the_right_mask(
    shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # plain, for speed
    length, window, heads, kv_heads = shape
    q, k, v, _ = (x.detach() for x in draw(length, heads, kv_heads))
    actual = attend(q, k, v, window, "flex", prepare_mask(length, window, CPU, "flex"))
    torch.testing.assert_close(actual.double(), naive(q, k, v, window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["flex", "matmul"])
def test_masks_are_prepared_once(backend: Backend) -> None:
    assert prepare_mask(64, 8, CPU, backend) is prepare_mask(64, 8, CPU, backend)
    assert prepare_mask(64, 8, CPU, backend) is not prepare_mask(64, 9, CPU, backend)


def test_no_mask_is_prepared_where_none_is_used() -> None:
    assert [prepare_mask(64, 8, CPU, b) for b in ("sdpa", "flash")] == [None] * 2
    assert prepare_mask(MATMUL_MAX_KEYS + 1, 8, CPU, "matmul") is None


@pytest.mark.parametrize(("length", "window"), [(64, 8), (300, 299), (300, 100)])
def test_prepared_biases_change_no_bit(length: int, window: int) -> None:
    q, k, v = (torch.randn(2, length, 2, 16) for _ in range(3))
    mask = prepare_mask(length, window, CPU, "matmul")
    assert torch.equal(attend(q, k, v, window, "matmul", mask), attend(q, k, v, window, "matmul"))


@pytest.mark.slow
def test_compiled_flex_on_a_cpu() -> None:
    torch.compiler.reset()
    q, k, v, _ = (x.detach() for x in draw(200, 4, 2))
    mask = prepare_mask(200, 30, CPU, "flex")
    actual = torch.compile(attend, dynamic=False)(q, k, v, 30, "flex", mask)
    torch.testing.assert_close(actual.double(), naive(q, k, v, 30), atol=1e-5, rtol=1e-5)


def test_uncompiled_flex_computes_as_sdpa_does() -> None:
    q, k, v, _ = (x.detach() for x in draw(200, 4, 2))
    expected = attend(q, k, v, 30, "sdpa")
    assert torch.equal(attend(q, k, v, 30, "flex"), expected)
    mask = prepare_mask(200, 30, CPU, "flex")
    assert torch.equal(attend(q, k, v, 30, "flex", mask), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["sdpa", "matmul", "flex", "flash"])
def test_every_backend_on_a_gpu(backend: str, shape: tuple[int, int, int, int]) -> None:
    if backend == "flash" and attention.flash_module(CUDA, torch.bfloat16) is None:
        pytest.skip("no flash_attn for this device")
    assert_attends(backend, shape, 0.05, dtype=torch.bfloat16, device=CUDA)


def test_long_rows_go_from_matmul_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = draw(101, 2, 2)
    short = attend(q[:, :100], k[:, :100], v[:, :100], 50, "matmul")
    monkeypatch.setattr(attention, "MATMUL_MAX_KEYS", 100)
    monkeypatch.setattr(attention, "_sdpa", lambda *_: pytest.fail("100 keys are not too many"))
    assert torch.equal(attend(q[:, :100], k[:, :100], v[:, :100], 50, "matmul"), short)
    monkeypatch.undo()
    monkeypatch.setattr(attention, "MATMUL_MAX_KEYS", 100)
    monkeypatch.setattr(attention, "_softmax_matmul", lambda *_: pytest.fail("101 are"))
    actual = attend(q, k, v, 50, "matmul")
    torch.testing.assert_close(actual.double(), naive(q, k, v, 50), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_scores_in_the_thousands_leave_no_nan(backend: Any, sign: int) -> None:
    q, k, v, upstream = draw(130, 2, 2)
    keys = torch.cat([q[:, :1] * sign, k[:, 1:]], dim=1)  # position 0 sees only this key
    out = attend(q * 40, keys * 40, v, 64, backend)
    torch.testing.assert_close(out[:, 0], v[:, 0])
    gradients = torch.autograd.grad(out, (q, k, v), upstream)
    assert all(x.isfinite().all() for x in (out, *gradients))


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int]
) -> Tensor:
    """Do what FlashAttention documents: (B, T, H, D); keys i - left .. i + right; causal."""
    left, right = window_size
    assert causal
    assert right == 0
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.size(2) % k.size(2) == 0
    return naive(q, k, v, left).to(q.dtype)


@pytest.mark.parametrize("package", ["flash_attn", "flash_attn_interface"])
@pytest.mark.parametrize("shape", SHAPES)
def test_flash_attention_is_called_as_documented(
    package: str, shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = ModuleType(package)
    module.flash_attn_func = flash_attn_func
    if package == "flash_attn_interface":  # some builds also return the log-sum-exp
        module.flash_attn_func = lambda *args, **options: (flash_attn_func(*args, **options), None)
    monkeypatch.setitem(sys.modules, package, module)
    monkeypatch.setattr(attention, "flash_module", lambda device, dtype: package)
    assert_attends("flash", shape, 1e-5)


def pretend(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: Collection[str]
) -> None:
    """Set what CUDA's device is capable of and which packages are there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    known, real = ("triton", "flash_attn", "flash_attn_interface"), importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        if name in known:
            return SimpleNamespace(name=name) if name in installed else None
        return real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


@pytest.mark.parametrize(
    ("dtype", "capability", "installed", "backend", "why"),
    [
        ("bfloat16", (9, 0), "triton flash_attn flash_attn_interface", "flash", "_interface"),
        ("bfloat16", (9, 0), "triton flash_attn", "flash", "flash_attn is installed"),
        ("float16", (8, 9), "triton flash_attn", "flash", "flash_attn is installed"),
        ("bfloat16", (12, 0), "flash_attn", "flash", "flash_attn is installed"),
        ("bfloat16", (12, 0), "triton flash_attn_interface", "flex", "without flash_attn"),
        ("float16", (7, 5), "triton flash_attn", "flex", "without flash_attn"),
        ("float32", (9, 0), "triton flash_attn", "flex", "without flash_attn"),
        ("bfloat16", (9, 0), "triton", "flex", "without flash_attn"),
        ("bfloat16", (9, 0), "", "sdpa", "without flash_attn or Triton"),
    ],
)
def test_the_choice_on_cuda(
    dtype: str,
    capability: tuple[int, int],
    installed: str,
    backend: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, capability, installed.split())
    chosen, reason = choose_backend(CUDA, getattr(torch, dtype))
    assert chosen == backend
    assert why in reason


def test_the_choice_elsewhere() -> None:
    assert choose_backend(CPU, torch.float32)[0] == "matmul"
    assert choose_backend(CPU, torch.bfloat16)[0] == "matmul"
    assert choose_backend(torch.device("mps"), torch.float16)[0] == "sdpa"


@torch.no_grad()
def test_the_choice_for_float16_on_a_cpu_does_not_overflow() -> None:
    backend, _ = choose_backend(CPU, torch.float16)
    q = torch.full((1, 3, 1, 128), 1.2, dtype=torch.float16)  # aligned: the largest scores, 16.3
    assert torch.equal(attend(q, q, q, 2, backend), q)


def test_a_forced_backend_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("sdpa", "matmul", "flex"):
        assert choose_backend(CUDA, torch.bfloat16, backend) == (backend, "forced")
    for backend in ("sdpa", "matmul"):
        assert choose_backend(CPU, torch.float32, backend) == (backend, "forced")
    with pytest.raises(ValueError, match="'flex' has no gradients on cpu"):
        choose_backend(CPU, torch.float32, "flex")
    with pytest.raises(ValueError, match="'matmul' overflows in float16"):
        choose_backend(CPU, torch.float16, "matmul")
    pretend(monkeypatch, (9, 0), ["flash_attn"])
    assert choose_backend(CUDA, torch.bfloat16, "flash") == ("flash", "forced")
    for device, dtype in ((CPU, torch.bfloat16), (CUDA, torch.float32)):
        with pytest.raises(ValueError, match="'flash' needs a CUDA device"):
            choose_backend(device, dtype, "flash")
    with pytest.raises(ValueError, match="'flahs' is not one of sdpa, matmul, flex, varlen, flash"):
        choose_backend(CPU, torch.float32, "flahs")


def count_flops(backend: Any, length: int, window: int) -> int:
    """Count the products of a forward and a backward pass, one head of 16."""

    def fused(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
        scores = q[2] * k[2]
        if options.get("is_causal") or True in rest:  # the kernel skips what it cannot see
            scores = scores * (k[2] + 1) // (2 * k[2])
        return 4 * q[0] * q[1] * q[3] * scores

    def fused_backward(grad: Any, *rest: Any, **options: Any) -> int:
        return int(2.5 * fused(*rest, **options))

    name = "_scaled_dot_product_flash_attention_for_cpu"
    mapping = {
        getattr(torch.ops.aten, name): fused,
        getattr(torch.ops.aten, f"{name}_backward"): fused_backward,
    }
    q, k, v, upstream = draw(length, 1, 1)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        torch.autograd.grad(attend(q, k, v, window, backend), (q, k, v), upstream)
    return counter.get_total_flops()


def test_on_a_cpu_a_window_never_costs_more_than_none() -> None:
    for length in (1, 100, 128, 256, 300, 400, 512, 1024, 2048):
        full = count_flops("matmul", length, length)
        assert full > 0
        for window in (0, 1, 128, 256, 512, length - 2):
            assert count_flops("matmul", length, max(0, window)) <= full
    assert count_flops("matmul", 2048, 512) < 0.6 * count_flops("matmul", 2048, 2048)
    assert count_flops("matmul", 4096, 1024) < 0.8 * count_flops("matmul", 4096, 4096)
    assert count_flops("sdpa", 4096, 1024) == count_flops("matmul", 4096, 1024)


def test_flash_runs_between_two_graphs_of_a_compiled_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`importlib` and a foreign kernel cannot be part of one: they must not cost the rest."""
    monkeypatch.setattr(attention, "flash_module", lambda device, dtype: "flash_attn")
    calls = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append(torch.compiler.is_compiling())
        return attend(q, k, v, options["window_size"][0], "sdpa")

    module = SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    q, k, v, _ = (x.detach() for x in draw(64, 4, 2))

    def around(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q * 2, k, v, 16, "flash") + 1

    actual = torch.compile(around, backend=count, dynamic=False)(q, k, v)
    torch.testing.assert_close(actual, attend(q * 2, k, v, 16, "sdpa") + 1)
    assert calls == [False]
    assert len(graphs) == 2


# Packed documents


def draw_segments(length: int) -> Tensor:
    """Number the documents of two rows: the first has several, the last token one of its own."""
    starts = torch.zeros(2, length, dtype=torch.int64)
    starts[0, [0, 1, length // 3, length - 1]] = 1
    starts[1, length // 2] = 1
    return starts.cumsum(1)


def naive_documents(q: Tensor, k: Tensor, v: Tensor, window: int, segments: Tensor) -> Tensor:
    """Attend in each document as if it stood alone."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for row, numbers in enumerate(segments):
        for number in numbers.unique():
            own = numbers == number
            out[row, own] = naive(q[row, own][None], k[row, own][None], v[row, own][None], window)[
                0
            ]
    return out


@pytest.mark.parametrize("backend", ["sdpa", "matmul", "flex"])
@pytest.mark.parametrize(
    "shape", [(7, 1, 4, 2), (200, 64, 4, 2), (200, 500, 4, 1), (300, 10, 2, 1)]
)
def test_documents_of_a_row_do_not_see_each_other(
    backend: Backend, shape: tuple[int, int, int, int]
) -> None:
    length, window, heads, kv_heads = shape
    q, k, v, _ = (x.detach() for x in draw(length, heads, kv_heads))
    segments = draw_segments(length)
    mask = prepare_mask(segments.size(1), window, CPU, backend, segments)
    actual = attend(q, k, v, window, backend, mask, segments)
    expected = naive_documents(q, k, v, window, segments)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("window", [10, 64, 500])
def test_flex_is_given_the_right_documents(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # plain, for speed
    q, k, v, _ = (x.detach() for x in draw(200, 4, 2))
    segments = draw_segments(200)
    mask = prepare_mask(segments.size(1), window, CPU, "flex", segments)
    actual = attend(q, k, v, window, "flex", mask, segments)
    expected = naive_documents(q, k, v, window, segments)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [10, 500])
@pytest.mark.parametrize("packed", [False, True])
def test_varlen_is_given_the_right_rows_documents_and_windows(
    window: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel needs a card; a plain one that does what its documentation says stands in."""

    def varlen_attn(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, k_starts: Tensor, *most: int, **given: Any
    ) -> Tensor:
        assert starts.dtype == k_starts.dtype == torch.int32
        assert torch.equal(starts, k_starts)
        pairs = list(itertools.pairwise(starts.tolist()))
        assert max(stop - start for start, stop in pairs) <= min(most)
        parts = [tuple(x[None, a:b] for x in (q, k, v)) for a, b in pairs if b > a]
        return torch.cat([naive(*part, given["window_size"][0])[0] for part in parts])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    q, k, v, _ = (x.detach() for x in draw(200, 4, 2))
    segments = draw_segments(200) if packed else torch.zeros(2, 200, dtype=torch.int64)
    mask = prepare_mask(segments.size(1), window, CPU, "varlen", segments) if packed else None
    actual = attend(q, k, v, window, "varlen", mask, segments if packed else None)
    expected = naive_documents(q, k, v, window, segments)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


def test_rows_too_long_for_scores_in_memory_keep_their_documents_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "MATMUL_MAX_KEYS", 100)
    q, k, v, _ = (x.detach() for x in draw(200, 2, 2))
    segments = draw_segments(200)
    expected = attend(q, k, v, 500, "sdpa", segments=segments)
    assert torch.equal(attend(q, k, v, 500, "matmul", segments=segments), expected)


@pytest.mark.slow
def test_new_documents_do_not_compile_flex_again() -> None:
    torch.compiler.reset()
    q, k, v, _ = (x.detach() for x in draw(200, 4, 2))
    compiled = torch.compile(attend, dynamic=False)
    for segments in (draw_segments(200), draw_segments(200).flip(0)):
        mask = prepare_mask(segments.size(1), 30, CPU, "flex", segments)
        actual = compiled(q, k, v, 30, "flex", mask, segments)
        expected = naive_documents(q, k, v, 30, segments)
        torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
        torch.compiler.set_stance("fail_on_recompile")
    torch.compiler.set_stance("default")
