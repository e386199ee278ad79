"""Causal attention, optionally over a sliding window, behind one function (SPEC section 2).

Five backends compute the same thing:

- `sdpa`    torch's fused attention. Windows are computed in blocks of queries that see only
            the keys they can reach, so they never cost more than a full layer. Runs everywhere.
- `matmul`  two matrix products around a softmax, in the same blocks. On CPUs it beats the fused
            kernel at short lengths, where scores fit in the cache (docs/LOG.md has figures).
- `flex`    FlexAttention (https://arxiv.org/abs/2412.05496) with a block mask, which skips what
            the window hides. Needs CUDA and a compiler; uncompiled code takes `varlen` instead.
- `varlen`  torch's own FlashAttention 2 for rows of unequal lengths. Needs CUDA and 16 bits.
- `flash`   FlashAttention (https://arxiv.org/abs/2205.14135) from the `flash_attn` packages,
            versions 3 and 2, where installed.

`flex` and `varlen` are for windows: a layer that sees its whole row takes `sdpa`, which is faster.

Sliding windows are those of Longformer (https://arxiv.org/abs/2004.05150), and several query heads
may share a key/value head (grouped queries, https://arxiv.org/abs/2305.13245).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Iterator
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["sdpa", "matmul", "flex", "varlen", "flash"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

MATMUL_MAX_KEYS = 2048
"""Longest row of scores that the `matmul` backend keeps in memory; beyond it, `sdpa` takes over."""
MIN_BLOCK = 128
"""Fewest queries in a block: smaller products no longer pay for their launch."""
MAX_BLOCKS = 8
"""Small blocks skip more of what a window hides, large ones run fewer kernels."""
MAX_SCORE = 60.0
"""exp(60) times any row length stays finite in float32 and in bfloat16."""


class Past(Protocol):
    """One layer's KV cache: what it keeps of the tokens before those that it is given."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from new tokens (B, T, H, D) to what is kept and to themselves (B, T, K, D)."""
        ...


def choose_backend(
    device: torch.device, dtype: torch.dtype, forced: str | None = None
) -> tuple[Backend, str]:
    """Pick the fastest backend that works on `device`, or check a forced one; say why.

    Raises:
        ValueError: the forced backend is unknown or cannot run here.
    """
    if forced is not None:
        if forced not in BACKENDS:
            raise ValueError(f"attention backend {forced!r} is not one of {', '.join(BACKENDS)}")
        if reason := _why_not(forced, device, dtype):
            raise ValueError(f"attention backend {forced!r} {reason}: use sdpa")
        return forced, "forced"
    if device.type == "cuda":
        if module := flash_module(device, dtype):
            return "flash", f"{module} is installed"
        if importlib.util.find_spec("triton") is not None:
            return "flex", "CUDA without flash_attn"
        return "sdpa", "CUDA without flash_attn or Triton"
    if device.type == "cpu" and dtype != torch.float16:  # exp(16) is not in its range
        return "matmul", f"CPU; rows of more than {MATMUL_MAX_KEYS} keys go to sdpa"
    return "sdpa", f"device {device.type}"


def _why_not(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    if backend == "flash" and flash_module(device, dtype) is None:
        return "needs a CUDA device, a 16-bit dtype and the flash_attn package"
    if backend == "varlen" and not runs_varlen(device, dtype):
        return "needs a CUDA device of sm80 or newer and a 16-bit dtype"
    if backend == "flex" and device.type != "cuda":
        return f"has no gradients on {device.type}"
    if backend == "matmul" and dtype == torch.float16:
        return "overflows in float16"
    return None


def prepare_mask(
    length: int, window: int, device: torch.device, backend: Backend, segments: Tensor | None = None
) -> Any:
    """Return what `attend` needs for these sizes beside its tensors. Call it outside of compiled
    code.

    That is a block mask for `flex` and each block's biases for `matmul`, for which compiled code
    would otherwise compare positions for every score. With `segments` (B, T) it is made for each
    batch: a block mask for `flex`, the documents' first tokens for `varlen`. It is None elsewhere.
    """
    if segments is None:
        return _fixed_mask(length, window, device, backend)
    if backend == "varlen":
        return _document_starts(segments)
    return _flex_mask(length, window, device, segments) if backend == "flex" else None


@functools.lru_cache(maxsize=64)
def _fixed_mask(length: int, window: int, device: torch.device, backend: Backend) -> Any:
    if backend == "flex" and window < length - 1:
        return _flex_mask(length, window, device)
    if backend == "matmul" and length <= MATMUL_MAX_KEYS:
        return tuple(
            _bias(_band_mask(stop - start, stop - first, window, start - first, device))
            for start, stop, first in _blocks(length, min(window, length - 1))
        )
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    backend: Backend,
    mask: Any = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Attend causally, and return (B, T, H, D) in q's dtype.

    The query at t sees keys t-window .. t, scaled by 1/sqrt(D). There may be more keys than
    queries: the last query then is the last key's.

    Args:
        q: (B, T, H, D).
        k: (B, S, K, D), S >= T; query head i reads head floor(i * K / H).
        v: (B, S, K, D).
        window: how far back a query sees; T-1 or more means everything before it.
        mask: from `prepare_mask`; without one, or uncompiled, `flex` computes as `varlen` or
            `sdpa` do: it has to be compiled, once for each length, or it holds every score.
        segments: (B, T) numbers of the documents that are packed in a row; a query sees its own
            document only, and T = S. `flash` cannot do this; `varlen` without a mask computes as
            `sdpa` does.
    """
    window = min(window, k.size(1) - 1)
    if backend == "flash":
        assert segments is None, "documents are masked by the other backends"
        from archerchat.model.flash import attend_flash

        return attend_flash(q, k, v, window, flash_module)  # type: ignore[no-any-return]
    continues = k.size(1) > q.size(1)
    limited = continues or window < q.size(1) - 1
    if backend == "flex" and segments is None and not limited:
        backend = "sdpa"
    if backend == "flex" and (mask is None or continues or not torch.compiler.is_compiling()):
        backend, mask = "varlen" if runs_varlen(q.device, q.dtype) else "sdpa", None
    if backend == "varlen":
        if segments is None and limited:
            return _attend_varlen(q, k, v, window, _row_starts(q), _row_starts(k))
        if segments is not None and mask is not None:
            return _attend_varlen(q, k, v, window, mask, mask)
        backend = "sdpa"
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or K, T, D)
    if backend == "flex":
        out = _attend_flex(q, k, v, mask)
    else:
        out = _attend_blocks(q, k, v, window, backend, mask, segments)
    return out.transpose(1, 2)


def _attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    backend: Backend,
    biases: Any,
    segments: Tensor | None,
) -> Tensor:
    """Take queries in blocks, each with only the keys that its window reaches."""
    length, before = q.size(2), k.size(2) - q.size(2)
    if backend == "matmul" and length + before > MATMUL_MAX_KEYS:
        backend = "sdpa"
    if backend == "sdpa" and window >= length - 1 and not before and segments is None:
        return _sdpa(q, k, v, None)
    run = _sdpa if backend == "sdpa" else _softmax_matmul
    outputs = []
    for i, (start, stop, first) in enumerate(_blocks(length, window, before)):
        keys = slice(first, before + stop)
        part = q[:, :, start:stop], k[:, :, keys], v[:, :, keys]
        if backend == "matmul" and biases is not None:
            outputs.append(_softmax_matmul(*part, biases[i]))
            continue
        offset = before + start - first
        mask = _band_mask(stop - start, before + stop - first, window, offset, q.device)
        if segments is not None:
            same = segments[:, None, start:stop, None] == segments[:, None, None, keys]
            mask = same & mask  # (B, 1, queries, keys)
        outputs.append(run(*part, mask if backend == "sdpa" else _bias(mask)))
    return torch.cat(outputs, dim=2)


def _blocks(length: int, window: int, before: int = 0) -> Iterator[tuple[int, int, int]]:
    """Yield each block's first query, the query after its last, and the first key it can see."""
    block = max(MIN_BLOCK, math.ceil(length / MAX_BLOCKS))
    for start in range(0, length, block):
        yield start, min(start + block, length), max(0, before + start - window)


def _bias(mask: Tensor) -> Tensor:
    """Return what to add to scores: 0 where the mask lets them through, else minus infinity."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)


def _band_mask(queries: int, keys: int, window: int, offset: int, device: torch.device) -> Tensor:
    """Return (queries, keys) booleans: which key each query sees; query 0 is key `offset`."""
    t = torch.arange(queries, device=device)[:, None] + offset
    s = torch.arange(keys, device=device)[None, :]
    return (s <= t) & (s >= t - window)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1)
    )


class _SoftmaxMatmul(torch.autograd.Function):
    """Attention by two products in the compute dtype around a softmax in float32.

    Exponentials are taken without subtracting the row's maximum, which saves two passes over the
    scores: normalised queries and keys bound them by 1.44 * sqrt(D). The clamp keeps inputs that
    are not normalised finite; gradients ignore it. Autograd would take the exponentials a second
    time, and would give the keys' gradient as the transpose of q^T @ g, which what reads it next
    steps through a row at a time.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        k, v = k.contiguous(), v.contiguous()  # or their transposes are copied, slowly
        scores = (q @ k.mT).float() * (1 / math.sqrt(q.size(3)))
        weights = (scores.clamp(-MAX_SCORE, MAX_SCORE) + bias).exp()
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights.to(v.dtype)
        out = ((weights @ v).float() / total).to(v.dtype)
        ctx.save_for_backward(q, k, v, weights, total, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, total, out = ctx.saved_tensors
        grad = grad_outputs[0].float() / total
        mean = (grad * out.float()).sum(dim=-1, keepdim=True)
        grad = grad.to(v.dtype)
        grad_weights = (grad @ v.mT).float() - mean
        grad_scores = (grad_weights * weights.float() * (1 / math.sqrt(q.size(3)))).to(q.dtype)
        return grad_scores @ k, grad_scores.mT @ q, weights.mT @ grad, None


def _softmax_matmul(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    groups = q.size(1) // k.size(1)
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out: Tensor = _SoftmaxMatmul.apply(q, k, v, bias)  # type: ignore[no-untyped-call]
    return out


def _flex_mask(
    length: int, window: int, device: torch.device, segments: Tensor | None = None
) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (key <= query) & (key >= query - window)
        return near if segments is None else near & (segments[b, query] == segments[b, key])

    batch = None if segments is None else segments.size(0)
    return create_block_mask(visible, batch, None, length, length, device=str(device))


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    out: Tensor = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))
    return out


def _capability(device: torch.device, dtype: torch.dtype) -> int:
    """Return the major compute capability; 0 for other devices and for 32 bits."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return 0
    return torch.cuda.get_device_capability(device)[0]


def runs_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's variable-length attention runs there."""
    return _capability(device, dtype) >= 8


def _row_starts(x: Tensor) -> Tensor:
    """Return the first positions (B + 1,) of the rows of (B, T, ...), laid end to end."""
    batch, length = x.shape[:2]
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=x.device)


def _document_starts(segments: Tensor) -> Tensor:
    """Return the first positions (n,) of the documents in rows (B, T) laid end to end.

    The end follows, as often as makes n a power of two: compiled code sees few sizes.
    """
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    found = begins.flatten().nonzero()[:, 0]
    count = 1 << len(found).bit_length()
    return F.pad(found, (0, count - len(found)), value=segments.numel()).to(torch.int32)


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, window: int, q_starts: Tensor, k_starts: Tensor
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = q.size(2) // k.size(2)
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    shape, queries, keys = q.shape, q.size(1), k.size(1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = varlen_attn(q, k, v, q_starts, k_starts, queries, keys, window_size=(window, 0))
    assert isinstance(out, Tensor)
    return out.view(shape)


def flash_module(device: torch.device, dtype: torch.dtype) -> str | None:
    """Name the installed FlashAttention package that runs on `device`, or None."""
    major = _capability(device, dtype)
    if major == 9 and importlib.util.find_spec("flash_attn_interface") is not None:
        return "flash_attn_interface"
    if major >= 8 and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attn"
    return None
