"""A step is right for rows in any number of parts, beside places that nothing was put in."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from archerchat.inference.model_runner import (
    PART_ROWS,
    SPAN,
    ModelRunner,
    Prefill,
    forward_token,
    row_spans,
)
from archerchat.inference.sampler import SamplingPlan
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Request
from archerchat.model.transformer import Transformer

Prompt = Callable[[int], list[int]]
GREEDY = SamplingParams(temperature=0)


def begin(runner: ModelRunner, row: int, prompt: list[int]) -> int:
    """Start a row; return its first token."""
    ran = Prefill(runner.model, [prompt])
    runner.start(row, ran.prefix(0), Request(prompt, GREEDY), seed=0)
    runner.sample_first(row, ran.last_logits, SamplingPlan())
    return int(runner.tokens[row])


def test_places_without_a_row_may_run_too(model: Transformer, prompt: Prompt) -> None:
    """As in a captured graph, whose rows are rounded up; and a row may begin there later."""
    first, second = prompt(20), prompt(3)
    runner = ModelRunner(model, 4, 200, compile=False)
    said = [begin(runner, 0, first)]
    for _ in range(8):
        runner._run(forward_token, [(0, 4, 64)], SamplingPlan())
        said.append(int(runner.tokens[0]))
    late = [begin(runner, 2, second)]
    for _ in range(8):
        runner._run(forward_token, [(0, 4, 64)], SamplingPlan())
        said.append(int(runner.tokens[0]))
        late.append(int(runner.tokens[2]))
    for start, answer in ((first, said), (second, late)):
        with torch.no_grad():
            best = model(torch.tensor([start + answer]))[0, len(start) - 1 : -1].argmax(dim=-1)
        assert best.tolist() == answer


@given(st.lists(st.integers(1, 300), min_size=1, max_size=70))
def test_parts_cover_the_rows_and_reach_past_their_lengths(lengths: list[int]) -> None:
    spans = list(row_spans(lengths))
    assert [first for first, _, _ in spans] == [0, *(stop for _, stop, _ in spans[:-1])]
    assert spans[-1][1] == len(lengths)
    assert all(a[2] != b[2] for a, b in pairwise(spans))
    for first, stop, span in spans:
        assert first % PART_ROWS == 0
        assert span % SPAN == 0
        assert max(lengths[first:stop]) < span <= max(lengths[first:stop]) + SPAN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_in_parts_say_what_they_say_alone(
    build: Any, prompt: Prompt, dtype: torch.dtype
) -> None:
    model = build(dtype=dtype)
    prompts = [prompt(1 + 4 * n) for n in range(40)]
    together = ModelRunner(model, 40, 256, compile=False)
    for row, ids in enumerate(prompts):
        begin(together, row, ids)
    lengths = [len(ids) for ids in prompts]
    assert len(list(row_spans(lengths))) == 3
    together.step(lengths, SamplingPlan())
    keys = torch.stack([keys[:, :, -1] for keys, _ in together.cache.views(0, 40, 256)])
    assert keys.isfinite().all()
    for row in (0, 15, 16, 39):
        alone = ModelRunner(model, 1, 256, compile=False)
        begin(alone, 0, prompts[row])
        alone.step([lengths[row]], SamplingPlan())
        for ours, its in zip(
            together.cache.views(row, row + 1, 256), alone.cache.views(0, 1, 256), strict=True
        ):
            for a, b in zip(ours, its, strict=True):
                tolerance = 1e-4 if dtype == torch.float32 else 0.1
                torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def test_fetched_tokens_are_those_at_the_time(model: Transformer) -> None:
    runner = ModelRunner(model, 4, 64, compile=False)
    runner.tokens.copy_(torch.tensor([5, 6, 7, 8]))
    fetches = [runner.fetch(0, 4, SamplingPlan()), runner.fetch(2, 1, SamplingPlan())]
    runner.tokens.zero_()
    read = [[token for (token,) in fetch()] for fetch in fetches]
    assert read == [[5, 6, 7, 8], [7]]
