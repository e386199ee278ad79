"""Draws follow the filtered distribution, and nothing but a row's own seed and position."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from archerchat.inference.sampler import Sampler, SamplingPlan, uniforms
from archerchat.inference.sampling_params import SamplingParams, derive_seed

CPU = torch.device("cpu")
LOGITS = torch.tensor([1.0, 3.0, 2.0, 3.0, -1.0, 0.5])


def params(temperature: float, top_k: int | None = None, top_p: float | None = None,
           seed: int = 0) -> SamplingParams:  # fmt: skip
    return SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)


def draw(logits: Tensor, rows: list[SamplingParams], positions: Tensor | None = None,
         plan: SamplingPlan | None = None) -> list[int]:  # fmt: skip
    sampler = Sampler(len(rows), logits.size(1), CPU)
    for row, each in enumerate(rows):
        sampler.assign(row, each, each.seed, [0])
    if positions is None:
        positions = torch.zeros(len(rows), dtype=torch.int64)
    plan = plan or SamplingPlan.covering(rows)
    tokens: list[int] = sampler.sample(logits, positions, plan).tolist()
    return tokens


def shares(temperature: float, top_k: int | None = None, top_p: float | None = None,
           logits: Tensor = LOGITS, count: int = 6000) -> Tensor:  # fmt: skip
    rows = [params(temperature, top_k, top_p, derive_seed(1, n)) for n in range(count)]
    tokens = draw(logits.expand(count, -1), rows)
    return torch.bincount(torch.tensor(tokens), minlength=logits.numel()) / count


def close(found: Tensor, expected: Tensor) -> None:
    """Within four standard deviations of 6000 draws."""
    bound = 4 * (expected * (1 - expected) / 6000).sqrt()
    assert ((found - expected).abs() <= bound).all(), (found, expected)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_draws_follow_the_softmax_at_a_temperature(temperature: float) -> None:
    close(shares(temperature), (LOGITS / temperature).softmax(0))


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 6, 100])
def test_top_k_keeps_so_many_lower_ids_first_among_equals(top_k: int) -> None:
    kept = torch.tensor([1, 3, 2, 0, 5, 4])[:top_k]
    expected = torch.full((6,), -math.inf).scatter(0, kept, LOGITS[kept]).softmax(0)
    close(shares(1.0, top_k), expected)
    flat = shares(1.0, top_k, logits=torch.zeros(6))
    assert flat.nonzero().flatten().tolist() == list(range(min(top_k, 6)))


@pytest.mark.parametrize(("top_p", "kept"), [
    (1e-6, [1]), (0.35, [1]), (0.40, [1, 3]), (0.75, [1, 3]), (0.85, [1, 3, 2]), (1.0, [*range(6)]),
])  # fmt: skip
def test_top_p_keeps_the_fewest_with_that_share(top_p: float, kept: list[int]) -> None:
    """The shares are 0.372 twice, 0.137, 0.050, 0.031 and 0.007 (rounded)."""
    index = torch.tensor(kept)
    expected = torch.full((6,), -math.inf).scatter(0, index, LOGITS[index]).softmax(0)
    close(shares(1.0, top_p=top_p), expected)


def test_top_p_is_of_what_top_k_left() -> None:
    """Of three tokens the shares are 0.42, 0.42 and 0.16: 0.8 takes two, as does 0.8 of all."""
    kept = shares(1.0, top_k=3, top_p=0.85).nonzero().flatten().tolist()
    assert kept == [1, 2, 3]
    assert shares(1.0, top_k=3, top_p=0.8).nonzero().flatten().tolist() == [1, 3]
    assert shares(1.0, top_k=1, top_p=0.99).nonzero().flatten().tolist() == [1]


def test_temperature_0_takes_the_most_likely_beside_rows_that_draw() -> None:
    rows = [params(0, 5, 0.5, 1), params(1.0, seed=2), params(0, seed=3)]
    for position in range(20):
        tokens = draw(LOGITS.expand(3, -1), rows, torch.full((3,), position))
        assert tokens[0] == tokens[2] == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9))
def test_a_draw_does_not_depend_on_the_rows_around_it(seed: int, count: int) -> None:
    random = Random(seed)
    rows = [
        params(
            random.choice([0, 0.7, 1.0, 2.0]),
            random.choice([None, 1, 3, 17, 50]),
            random.choice([None, 0.2, 0.9, 1.0]),
            derive_seed(seed, n),
        )
        for n in range(count)
    ]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 50, generator=generator) * 3
    if random.random() < 0.5:
        logits = logits.round()  # ties
    positions = torch.randint(0, 2048, (count,), generator=generator)
    together = draw(logits, rows, positions)
    alone = [
        draw(logits[n : n + 1], rows[n : n + 1], positions[n : n + 1])[0] for n in range(count)
    ]
    assert together == alone
    everything = SamplingPlan(random=True, top_k=64, top_p=True)
    assert draw(logits, rows, positions, everything) == together


def test_a_plan_is_the_least_that_covers() -> None:
    def rule(
        temperature: float = 1.0, k: int | None = None, p: float | None = None
    ) -> SamplingParams:
        return params(temperature, k, p)

    assert SamplingPlan.covering([]) == SamplingPlan.covering([rule(0, 9, 0.5)]) == SamplingPlan()
    assert SamplingPlan.covering([rule(), rule(0)]) == SamplingPlan(random=True)
    assert SamplingPlan.covering([rule(k=50), rule(k=3)]) == SamplingPlan(random=True, top_k=64)
    assert SamplingPlan.covering([rule(k=64)]).top_k == 64
    assert SamplingPlan.covering([rule(k=1)]).top_k == 1
    assert SamplingPlan.covering([rule(p=0.9)]) == SamplingPlan(random=True, top_p=True)
    greedy = SamplingParams(temperature=0, min_p=0.5, presence_penalty=1, logit_bias={3: 1.0})
    assert SamplingPlan.covering([greedy]) == SamplingPlan(penalties=True, bias=True)
    assert SamplingPlan.covering([SamplingParams(min_p=0.1, logprobs=0)]) == SamplingPlan(
        random=True, min_p=True, logprobs=True
    )


def test_numbers_are_uniform_and_unrelated_in_seed_sample_and_position() -> None:
    seeds = torch.tensor([derive_seed(seed, sample) for seed in range(50) for sample in range(8)])
    u = uniforms(seeds[:, None], torch.arange(64)[None, :])  # (400, 64)
    assert u.dtype == torch.float32
    assert ((u >= 0) & (u < 1)).all()
    assert (u * 2**24 == (u * 2**24).round()).all()
    counts = torch.histc(u, bins=20, min=0, max=1)
    expected = u.numel() / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi squared, 19 degrees, 0.1 %
    along_positions = torch.corrcoef(torch.stack([u[:, :-1].flatten(), u[:, 1:].flatten()]))[0, 1]
    along_seeds = torch.corrcoef(torch.stack([u[:-1].flatten(), u[1:].flatten()]))[0, 1]
    assert abs(along_positions) < 0.025
    assert abs(along_seeds) < 0.025
    assert u.unique().numel() > 0.999 * u.numel() - 30


def mixed(x: int) -> int:
    """Wellons's lowbias32 on unsigned integers."""
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_numbers_never_change() -> None:
    """A seed's answers stay the same from one version to the next, on every device."""
    seeds, positions = [derive_seed(0, 0), derive_seed(42, 3), 2**63 - 1], [0, 5, 2**31]
    assert derive_seed(42, 3) != derive_seed(42, 2)
    assert all(0 <= derive_seed(s, n) < 2**63 for s in (0, 1, 2**63 - 1) for n in range(3))
    found = (uniforms(torch.tensor(seeds), torch.tensor(positions)) * 2**24).long().tolist()
    for seed, position, bits in zip(seeds, positions, found, strict=True):
        x = mixed((seed % 2**32) ^ 0x5BD1E995)
        x = mixed(mixed(x ^ seed >> 32) ^ position)
        assert bits == mixed(x ^ 0x27D4EB2F) >> 8
    assert found == [2989746, 16474385, 197810]


def test_the_rarest_tokens_can_be_reached_and_impossible_ones_cannot() -> None:
    """A total that rounding makes smaller than the sum, at the end of a wide vocabulary."""
    logits = torch.zeros(1, 32768)
    logits[0, 20000:] = -math.inf
    for position in range(100):
        rows = [params(1.0, seed=position)]
        (token,) = draw(logits, rows, torch.tensor([position]))
        assert 0 <= token < 20000


def plain_probabilities(
    logits: list[float], params: SamplingParams, prompt: list[int], said: list[int]
) -> dict[int, float]:
    """What a row samples from, in a few lines of float64, one parameter after the other."""
    adjusted = {}
    for token, logit in enumerate(logits):
        if token in prompt or token in said:
            penalty = params.repetition_penalty
            logit = logit / penalty if logit > 0 else logit * penalty
        logit -= params.frequency_penalty * said.count(token)
        logit -= params.presence_penalty * (token in said)
        adjusted[token] = logit + params.logit_bias.get(token, 0.0)
    ranked = sorted(adjusted, key=lambda token: (-adjusted[token], token))
    if params.temperature == 0:
        return {ranked[0]: 1.0}
    best = adjusted[ranked[0]]
    weights = {t: math.exp((adjusted[t] - best) / params.temperature) for t in ranked}
    kept = ranked[: params.top_k or len(ranked)]
    if params.top_p is not None:
        total, mass = sum(weights[t] for t in kept), 0.0
        for place, token in enumerate(kept):
            if mass >= params.top_p * total:
                kept = kept[:place]
                break
            mass += weights[token]
    kept = [token for token in kept if weights[token] >= params.min_p]
    return {token: weights[token] for token in kept}


def plain_token(weights: dict[int, float], seed: int, position: int) -> int:
    u = float(uniforms(torch.tensor([seed]), torch.tensor([position])))
    aim, mass = u * sum(weights.values()), 0.0
    for token in sorted(weights):
        mass += weights[token]
        if mass > aim:
            return token
    return max(weights)


PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"presence_penalty": -1.5},
    {"frequency_penalty": 0.8},
    {"frequency_penalty": -0.4},
    {"logit_bias": {3: 2.5, 7: -100.0, 11: 4.0}},
    {"min_p": 0.2},
    {"min_p": 1.0},
]
TOGETHER = {
    **{"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.3},
    **{"logit_bias": {3: 2.5, 7: -100.0}, "min_p": 0.05, "top_k": 12, "top_p": 0.9},
}


@pytest.mark.parametrize("changes", [*PENALTIES, TOGETHER])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_each_parameter_does_what_its_plain_version_does(
    changes: dict[str, Any], temperature: float
) -> None:
    """Over twelve steps, in a batch with rows that do not use it, and that sample as alone."""
    size, random = 24, Random(5)
    generator = torch.Generator().manual_seed(3)
    with_it = SamplingParams(temperature=temperature, **changes)
    others = [SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_k=3, seed=9)]
    rows = [replace(with_it, seed=n) for n in range(20)] + others
    sampler, alone = Sampler(len(rows), size, CPU), Sampler(len(rows), size, CPU)
    prompts = [[random.randrange(size) for _ in range(6)] for _ in rows]
    for row, (each, prompt) in enumerate(zip(rows, prompts, strict=True)):
        sampler.assign(row, each, each.seed, prompt)
        alone.assign(row, each, each.seed, prompt)
    plan, plain_plan = SamplingPlan.covering(rows), SamplingPlan.covering(others)
    said: list[list[int]] = [[] for _ in rows]
    last: Tensor | None = None
    for step in range(12):
        logits = 2 * torch.randn(len(rows), size, generator=generator)
        positions = torch.full((len(rows),), step)
        before = logits.clone()
        tokens = sampler.sample(logits, positions, plan, said=last)
        assert torch.equal(logits, before)
        expected = [
            plain_token(
                plain_probabilities(logits[row].tolist(), each, prompts[row], said[row]),
                each.seed,
                step,
            )
            for row, each in enumerate(rows)
        ]
        assert tokens.tolist() == expected
        first = len(rows) - len(others)
        plain = alone.sample(logits[first:], positions[first:], plain_plan, first)
        assert plain.tolist() == expected[first:]
        last = tokens
        for row, token in enumerate(expected):
            said[row].append(token)


def test_a_row_counts_its_own_tokens_when_it_moves_and_when_its_place_is_taken() -> None:
    params = SamplingParams(temperature=0, presence_penalty=2.0, logit_bias={5: -100.0})
    sampler, plan = Sampler(2, 6, CPU), SamplingPlan.covering([params])
    for row in range(2):
        sampler.assign(row, params, 0, [0])
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.5, 0.0, 9.0]]).expand(2, -1)
    at = torch.zeros(2, dtype=torch.int64)
    assert sampler.sample(logits, at, plan).tolist() == [1, 1]
    assert sampler.sample(logits, at, plan, said=torch.tensor([1, 2])).tolist() == [2, 1]
    sampler.move(1, 0)
    assert sampler.sample(logits, at, plan, said=torch.tensor([3, 3])).tolist() == [1, 1]
    sampler.assign(1, params, 0, [0])
    assert sampler.sample(logits[1:], at[1:], plan, first=1).tolist() == [1]
    sampler.assign(1, SamplingParams(temperature=0), 0, [0])
    assert sampler.sample(logits, at, plan, said=torch.tensor([0, 0])).tolist() == [1, 5]


def test_tables_of_the_vocabulary_wait_for_a_request_that_needs_them() -> None:
    """A table that exists keeps its address, which captured steps have."""
    sampler, logits, at = Sampler(2, 6, CPU), torch.zeros(2, 6), torch.tensor([1, 1])
    plain = SamplingParams(top_k=3, top_p=0.5, logprobs=2)
    for row in range(2):
        sampler.assign(row, plain, 0, [0])
    sampler.sample(logits, at, SamplingPlan.covering([plain]), said=at)
    sampler.move(1, 0)
    assert not sampler._tables
    assert not sampler.state(2)
    asks = SamplingParams(presence_penalty=2.0, logit_bias={5: -100.0})
    for _ in range(2):
        sampler.assign(0, asks, 0, [0])
        tables = {name: table.data_ptr() for name, table in sampler._tables.items()}
        sampler.sample(logits, at, SamplingPlan.covering([plain, asks]), said=at)
        sampler.assign(0, plain, 0, [0])
        assert {name: table.data_ptr() for name, table in sampler._tables.items()} == tables
    assert tables.keys() == {"bias", "counts", "prompted"}


def test_log_probabilities_are_the_models_own() -> None:
    changes = {"logit_bias": {2: 50.0}, "temperature": 0.3, "logprobs": 3}
    rows = [SamplingParams(), SamplingParams(**changes), SamplingParams(logprobs=0)]
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)) * 3
    sampler = Sampler(4, 50, CPU)
    for row, each in enumerate(rows):
        sampler.assign(row + 1, each, row, [0])
    plan = SamplingPlan.covering(rows)
    tokens = sampler.sample(logits, torch.zeros(3, dtype=torch.int64), plan, first=1)
    assert tokens[1] == 2
    records, expected = sampler.records[1:], logits.double().log_softmax(dim=-1)
    assert records.size(1) == 1 + 2 * 20
    torch.testing.assert_close(
        records[:, 0].double(), expected.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=0
    )
    best = expected.topk(20)
    torch.testing.assert_close(records[:, 1:21].double(), best.values, atol=1e-5, rtol=0)
    assert torch.equal(records[:, 21:].long(), best.indices)
