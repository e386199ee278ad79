"""The cache keeps what windows reach, no more, and steps over it give the plain logits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, chain
from typing import Any

import pytest
import torch

from archerchat.inference.kv_cache import KVCache, RingLayer, attend_ring, ring_mask
from archerchat.inference.model_runner import Prefill, forward_token
from archerchat.model.attention import attend
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.planning.memory import kv_cache_bytes

CPU = torch.device("cpu")
Prompt = Callable[[int], list[int]]


def num_bytes(cache: KVCache) -> int:
    """Return the bytes of all keys and values."""
    return sum(ring.nbytes for ring in cache._rings.values())


@pytest.mark.parametrize("max_length", [1, 100, 128, 200, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_bytes_are_those_of_the_plan(max_length: int, dtype: torch.dtype) -> None:
    for config in (ModelConfig(256, 100, 4, 4, 2, 32), ModelConfig(512, 100, 3, 2, 2, 64, "SL")):
        cache = KVCache(config, 5, max_length, dtype, CPU)
        needed = 5 * kv_cache_bytes(config, dtype, max_length)
        views = chain.from_iterable(cache.views(0, 5, max_length))
        assert needed == sum(tensor.nbytes for tensor in views) == num_bytes(cache)


def test_its_bytes_are_the_references(model_golden: Any) -> None:
    cache = KVCache(model_golden.config, 1, 200, torch.float32, CPU)
    assert num_bytes(cache) == model_golden.facts["kv_read_bytes_200"]


@pytest.mark.parametrize("cuts", [(5,), (2, 3), (1, 1, 3)])
@torch.no_grad()
def test_steps_give_the_plain_logits_at_every_age(
    model: Transformer, prompt: Prompt, cuts: tuple[int, ...]
) -> None:
    """Rows of 1 to 300 tokens side by side, over windows of 128 and 256 that they outgrow."""
    starts = [1, 100, 127, 128, 240]
    ids = torch.tensor([prompt(300) for _ in starts])
    plain = model(ids)
    cache = KVCache(model.config, len(starts), 300, torch.float32, CPU)
    ran = Prefill(model, [ids[i, :start].tolist() for i, start in enumerate(starts)])
    for i in range(len(starts)):
        cache.fill(i, ran.prefix(i))
    rows = torch.arange(len(starts))
    ends = list(accumulate(cuts))
    for step in range(40):
        places = torch.tensor([start + step for start in starts])
        tokens = ids[rows, places]
        parts = [  # each read as far as its longest row reaches
            cache.views(end - cut, end, starts[end - 1] + step + 1)
            for cut, end in zip(cuts, ends, strict=True)
        ]
        out = forward_token(model, tokens, cache.lengths, cache.previous, parts)
        torch.testing.assert_close(out[0], plain[rows, places], atol=1e-4, rtol=1e-4)
        cache.append(out[1], out[2], rows)
    assert cache.lengths.tolist() == [start + 40 for start in starts]


def test_a_ring_is_the_window_before_a_token_and_the_token() -> None:
    generator = torch.Generator().manual_seed(0)
    length, window = 40, 8
    q, k, v = (torch.randn(1, length, 4, 16, generator=generator) for _ in range(3))
    expected = attend(q, k, v, window, "sdpa")
    ring_k, ring_v = torch.zeros(2, 1, 4, window, 16)
    for t in range(length):
        if t > 0:
            mask = ring_mask(torch.tensor([t]), window, q.dtype)
            layer = RingLayer([(ring_k, ring_v, mask)])
            out = layer.attend(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1])
            torch.testing.assert_close(out, expected[:, t : t + 1], atol=1e-5, rtol=1e-5)
        ring_k[:, :, t % window] = k[:, t]
        ring_v[:, :, t % window] = v[:, t]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernel_computes_what_products_do(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 3, 16, generator=generator).to(dtype)
    keys, values = torch.randn(2, 3, 2, 20, 16, generator=generator).to(dtype)
    mask = ring_mask(torch.tensor([1, 7, 30]), 20, dtype)
    assert (mask == 0).sum(dim=-1).flatten().tolist() == [1, 7, 20]
    out, total = attend_ring(q, keys, values, mask)
    scores = (q.float() @ keys.float().mT) / 4 + mask.float()
    tolerance = (
        {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0}
    )
    torch.testing.assert_close(out.float(), scores.softmax(-1) @ values.float(), **tolerance)
    torch.testing.assert_close(total, scores.logsumexp(-1), **tolerance)


def test_a_row_is_filled_and_moved_without_its_neighbours(
    model: Transformer, prompt: Prompt
) -> None:
    cache = KVCache(model.config, 3, 200, torch.float32, CPU)
    ran = Prefill(model, [prompt(150), prompt(40)])
    with pytest.raises(AssertionError, match="128 positions for 100 slots"):
        KVCache(model.config, 3, 100, torch.float32, CPU).fill(0, ran.prefix(0))
    for row, prefix in ((0, ran.prefix(0)), (1, ran.prefix(1)), (2, ran.prefix(0))):
        cache.fill(row, prefix)
    before = [tensor.clone() for tensor in cache.state(3)]
    cache.move(2, 0, 150)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.state(3), strict=True))
    cache.move(1, 2, 40)
    assert cache.lengths.tolist() == [150, 40, 40]
    assert torch.equal(cache.previous[1], cache.previous[2])
    assert all(torch.equal(ring[1], ring[2]) for pair in cache.views(0, 3, 40) for ring in pair)
    after = cache.state(3)
    for ring, was in zip(after[:-2], before[:-2], strict=True):
        assert torch.equal(ring[:, :, :2], was[:, :, :2])
