"""The transformer against SPEC section 2 written out naively, and its initial values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from archerchat.model.attention import Backend
from archerchat.model.config import ModelConfig
from archerchat.model.loss import weighted_loss
from archerchat.model.transformer import (
    Regions,
    Transformer,
    norm,
    rotary_tables,
    rotate,
    smear,
)

SMALL = ModelConfig(64, 500, 4, 4, 2, 64, "SSSL")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def naive_logits(w: dict[str, Tensor], config: ModelConfig, ids: Tensor) -> Tensor:
    """Follow SPEC section 2 line by line for one row of ids (T,), one head at a time."""

    def rms(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt()

    def turn(x: Tensor) -> Tensor:  # (T, D), as complex numbers
        half = x.size(1) // 2
        angles = t[:, None] * 100_000.0 ** (-torch.arange(half).double() / half)
        y = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), -angles)
        return torch.cat([y.real, y.imag], dim=1)

    t = torch.arange(len(ids)).double()
    x = rms(w["token_embedding.weight"][ids])
    gate = w["smear_lambda"] * torch.sigmoid(x[:, :24] @ w["smear_gate.weight"].T)
    x = x + torch.cat([torch.zeros(1, x.size(1)), gate[1:] * x[:-1]])
    x0 = middle = x
    for i in range(config.num_layers):
        attention, mlp = f"blocks.{i}.attention", f"blocks.{i}.mlp"
        x = w["residual_lambdas"][i] * x + w["input_lambdas"][i] * x0
        h, heads, dim = rms(x), [], config.head_dim
        q, k, v = (h @ w[f"{attention}.{name}.weight"].T for name in ("query", "key", "value"))
        if i % 2 == (config.num_layers - 1) % 2:
            gates = 3 * torch.sigmoid(h[:, :12] @ w[f"{attention}.value_gate.weight"].T)
            v = v + gates.repeat_interleave(dim, 1) * w[f"value_embeddings.{i}.weight"][ids]
        reach = t[:, None] - t[None, :]
        seen = (reach >= 0) & (reach <= config.windows[i])
        for head in range(config.num_heads):
            mine = slice(head * dim, (head + 1) * dim)
            group = head * config.num_kv_heads // config.num_heads
            theirs = slice(group * dim, (group + 1) * dim)
            query, key = (1.2 * rms(turn(y)) for y in (q[:, mine], k[:, theirs]))
            scores = (query @ key.T / math.sqrt(dim)).masked_fill(~seen, -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, theirs])
        x = x + torch.cat(heads, 1) @ w[f"{attention}.output.weight"].T
        x = x + (rms(x) @ w[f"{mlp}.up.weight"].T).relu().square() @ w[f"{mlp}.down.weight"].T
        middle = x if i == config.num_layers // 2 else middle
    x = rms(x - w["backout_lambda"] * middle)
    return 15 * torch.tanh(x @ w["unembedding.weight"][: config.vocab_size].T / 15)


def noisy_model(config: ModelConfig, backend: Any = "matmul") -> Transformer:
    """Return a model whose every parameter matters: the initial values hide half of it."""
    model = Transformer(config, backend=backend)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_logits_and_gradients_equal_a_naive_float64_model(backend: Any) -> None:
    config = ModelConfig(256, 500, 4, 4, 2, 64, "SSSL")
    model = noisy_model(config, backend)
    token_ids = torch.randint(500, (2, 200), generator=torch.Generator().manual_seed(2))
    exact = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    expected = torch.stack([naive_logits(exact, config, row) for row in token_ids])
    logits = model(token_ids)
    torch.testing.assert_close(logits, expected.float(), atol=1e-5, rtol=1e-5)
    expected[0].logsumexp(-1).mean().backward()
    logits[0].logsumexp(-1).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected_gradient = exact[name].grad
        assert expected_gradient is not None
        assert relative_error(parameter.grad, expected_gradient) < 1e-4, name


def test_the_padding_of_the_vocabulary_gets_no_logits_and_no_gradient() -> None:
    model = noisy_model(SMALL)
    token_ids = torch.arange(60)[None]
    assert model(token_ids).size(-1) == 500
    model(token_ids).sum().backward()
    gradient = model.unembedding.weight.grad
    assert gradient is not None
    assert gradient.shape == (512, 64)
    assert not gradient[500:].any()


def test_rotation_turns_pairs_of_halves_and_the_first_position_not_at_all() -> None:
    x = torch.randn(1, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_tables(torch.arange(5), 8, torch.float32)
    y = rotate(x, cos, sin)
    assert torch.equal(y[:, 0], x[:, 0])
    angle = 3 * 100_000 ** (-2 * 1 / 8)
    first = x[0, 3, 2, 1] * math.cos(angle) + x[0, 3, 2, 5] * math.sin(angle)
    second = -x[0, 3, 2, 1] * math.sin(angle) + x[0, 3, 2, 5] * math.cos(angle)
    torch.testing.assert_close(y[0, 3, 2, [1, 5]], torch.stack([first, second]))


def test_the_smear_reads_the_previous_token_unsmeared() -> None:
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    y = smear(x, torch.zeros(1, 24), torch.tensor([0.5]))
    assert torch.equal(y[:, 0], norm(x)[:, 0])
    torch.testing.assert_close(y[:, 1:], norm(x)[:, 1:] + 0.25 * norm(x)[:, :-1])


def test_initial_values_are_the_specifications() -> None:
    config = ModelConfig(64, 2048, 5, 4, 2, 256, "L")
    model = Transformer(config)
    model.init_weights(seed=7)
    weights = model.state_dict()
    bound = math.sqrt(3 / 256)
    uniform = {"query": bound, "key": bound, "value": bound, "up": 0.4 * bound}
    for name, weight in weights.items():
        part = name.split(".")[-2] if name.startswith("blocks.") else ""
        if part in uniform or name.startswith("value_embeddings."):
            limit = uniform.get(part, bound)
            assert 0.99 * limit < weight.abs().max() <= limit
            assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)
            assert abs(weight.mean().item()) < 0.02 * limit
        elif part in ("output", "down"):
            assert not weight.any()
        elif part == "value_gate" or name == "smear_gate.weight":
            assert 0 <= weight.min() < 0.004
            assert 0.016 < weight.max() <= 0.02
    for name, deviation in (("token_embedding.weight", 0.8), ("unembedding.weight", 0.001)):
        assert weights[name].std().item() == pytest.approx(deviation, rel=0.01)
        assert abs(weights[name].mean().item()) < 0.01 * deviation
    residual = torch.tensor([1.15, 1.125, 1.1, 1.075, 1.05])
    torch.testing.assert_close(weights["residual_lambdas"], residual)
    torch.testing.assert_close(
        weights["input_lambdas"], torch.tensor([0.2, 0.1625, 0.125, 0.0875, 0.05])
    )
    assert weights["smear_lambda"].item() == 0
    assert weights["backout_lambda"].item() == pytest.approx(0.2)


def test_a_fresh_model_knows_nothing() -> None:
    model = Transformer(SMALL)
    model.init_weights(0)
    token_ids = torch.arange(64)[None]
    hidden = model.hidden(token_ids)
    loss = weighted_loss(hidden, model.unembedding.weight, token_ids + 1, SMALL.vocab_size)
    assert loss.item() == pytest.approx(math.log(500), abs=0.01)


def test_one_seed_is_one_model_whatever_else_was_drawn() -> None:
    models = [Transformer(SMALL) for _ in range(3)]
    before = torch.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.init_weights(seed)
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["token_embedding.weight"], other["token_embedding.weight"])
    shallow = Transformer(ModelConfig(64, 500, 1, 4, 2, 64, "S"))
    shallow.init_weights(1)
    assert shallow.residual_lambdas.item() == pytest.approx(1.15)


@pytest.mark.parametrize(
    ("compute", "tables"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
)
def test_only_bfloat16_narrows_what_is_stored(compute: torch.dtype, tables: torch.dtype) -> None:
    model, exact = Transformer(SMALL, compute), Transformer(SMALL)
    model.init_weights(0)
    exact.init_weights(0)
    for (name, parameter), wide in zip(model.named_parameters(), exact.parameters(), strict=True):
        table = name.startswith(("token_embedding.", "value_embeddings."))
        assert parameter.dtype == (tables if table else torch.float32), name
        assert torch.equal(parameter, wide.to(parameter.dtype)), name
    assert model.hidden(torch.arange(5)[None]).dtype == compute


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "packed"), [(torch.float32, True), (torch.bfloat16, False)])
def test_compiled_regions_compute_what_the_plain_ones_do(dtype: torch.dtype, packed: bool) -> None:
    """Also where documents of a row are kept apart."""
    torch.compiler.reset()
    config = ModelConfig(150, 500, 3, 4, 2, 64, "SL" if packed else "L")
    model = Transformer(config, dtype, "matmul")
    model.load_state_dict(noisy_model(config).state_dict())
    generator = torch.Generator().manual_seed(2)
    token_ids = torch.randint(500, (2, 200), generator=generator)
    starts = torch.rand(2, 200, generator=generator) < 0.03
    segments = starts.cumsum(1) if packed else None
    gradients = []
    for regions in (Regions(), Regions.compiled()):
        model.zero_grad()
        hidden = model.hidden(token_ids, regions, segments=segments)
        weighted_loss(hidden, model.unembedding.weight, token_ids, 500).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()} | {"out": hidden})
    plain, fast = gradients
    # In bfloat16 fused kernels round less often; single scalars, sums of all, then differ most.
    tolerance, dimensions = (1e-5, 1) if dtype == torch.float32 else (0.05, 2)
    for name, expected in plain.items():
        actual = fast[name]
        assert expected is not None
        assert actual is not None
        if actual.ndim >= dimensions:
            assert relative_error(actual.float(), expected.float()) < tolerance, name


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
@pytest.mark.parametrize("regions", [None, Regions()])
def test_packed_documents_that_are_kept_apart_are_as_if_alone(
    backend: Backend, regions: Regions | None
) -> None:
    config = ModelConfig(600, 50, 4, 4, 2, 64)
    model = Transformer(config, torch.float32, backend)
    model.load_state_dict(noisy_model(config).state_dict())
    token_ids = torch.randint(50, (2, 400), generator=torch.Generator().manual_seed(3))
    segments = torch.zeros_like(token_ids)
    bounds = [0, 1, 150, 333, 400]
    segments[0, bounds[1:-1]] = 1
    segments = segments.cumsum(1)
    packed = model.logits(model.hidden(token_ids, regions, segments=segments))
    for start, stop in itertools.pairwise(bounds):
        alone = model(token_ids[:1, start:stop])
        torch.testing.assert_close(packed[:1, start:stop], alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed[1:], model(token_ids[1:]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(packed[:1], model(token_ids[:1]), atol=0.1)


@pytest.mark.parametrize("packed", [False, True])
def test_layers_computed_again_give_the_same_gradients(packed: bool) -> None:
    """Bit for bit; what they keep meanwhile is their input alone."""
    config = ModelConfig(32, 64, 4, 2, 1, 32, "SL")
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(64, (2, 32), generator=generator)
    documents = (token_ids == 0).cumsum(1) if packed else None
    gradients, kept = [], []
    for recomputes in (False, True):
        model = Transformer(config)
        model.init_weights(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1
        model.recomputes, saved = recomputes, list[int]()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor.nbytes) or tensor,  # type: ignore[misc]
            lambda tensor: tensor,
        ):
            hidden = model.hidden(token_ids, segments=documents)
        hidden.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        kept.append(sum(saved))
    assert all(map(torch.equal, *gradients))
    assert kept[1] < kept[0] / 4
