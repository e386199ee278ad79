"""Groups, five steps of the reference, exact continuation, and the door for GradScaler."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from archerchat.dial import LearningRates
from archerchat.exchange.nanochat import CONFIG_NAMES, to_archerchat_names
from archerchat.model.config import ModelConfig
from archerchat.model.loss import weighted_loss
from archerchat.model.transformer import Transformer
from archerchat.optim import optimizer as optimizer_module
from archerchat.optim.adamw import store_square
from archerchat.optim.optimizer import AdamGroup, MuonGroup, Optimizer, build_groups

CONFIG = ModelConfig(64, 128, 3, 4, 2, 64, "SSL")
WIDTH_SCALE = (64 / 768) ** -0.5
RATES = LearningRates(
    unembedding=0.008 * WIDTH_SCALE,
    embedding=0.3 * WIDTH_SCALE,
    value_embedding=0.15 * WIDTH_SCALE,
    residual_lambdas=0.005,
    input_lambdas=0.5,
    smear=0.2,
    matrix=0.02,
)
BUFFERS = {
    "exp_avg": "mean",
    "exp_avg_sq": "square",
    "momentum_buffer": "momentum",
    "second_momentum_buffer": "variance",
}
SCHEDULE = [(0.5, 0.85, 0.28), (1.0, 0.9, 0.2), (0.3, 0.95, 0.0)]


def build(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Transformer, Optimizer]:
    """Return a model, every parameter of which matters, and its optimizer."""
    model = Transformer(CONFIG, dtype)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, Optimizer(model, build_groups(model, RATES), dtype, **options)


def backward(
    model: Transformer, seed: int, scale: Callable[[Tensor], Tensor] = torch.Tensor.clone
) -> None:
    """Give every parameter the gradient of one batch's loss."""
    token_ids = torch.randint(128, (2, 33), generator=torch.Generator().manual_seed(seed))
    hidden = model.hidden(token_ids[:, :-1].to(model.device))
    targets = token_ids[:, 1:].to(model.device)
    scale(weighted_loss(hidden, model.unembedding.weight, targets, 128)).backward()


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.fixture(scope="module")
def facts(oracle_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((oracle_dir / "optim_small.json").read_text())
    return content


@pytest.fixture(scope="module")
def tensors(oracle_dir: Path) -> dict[str, Tensor]:
    return load_file(oracle_dir / "optim_small.safetensors")


def golden(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors under `prefix`, in float32, by our names."""
    found = {n.removeprefix(prefix): t.float() for n, t in tensors.items() if n.startswith(prefix)}
    return to_archerchat_names(found)


def test_groups_equal_the_goldens(facts: dict[str, Any]) -> None:
    config = ModelConfig(**{CONFIG_NAMES[k]: v for k, v in facts["config"].items()})
    assert config == CONFIG
    groups = build_groups(Transformer(config), RATES)
    for group, expected in zip(groups, facts["groups"], strict=True):
        names = dict.fromkeys(expected["params"], torch.empty(0))
        assert group.names == tuple(to_archerchat_names(names))
        assert group.rate == pytest.approx(expected["initial_lr"], rel=1e-12)
        assert expected.get("eps", 1e-10) == optimizer_module.EPSILON
        if isinstance(group, AdamGroup):
            assert expected["kind"] == "adamw"
            assert group.betas == tuple(expected["betas"])
            assert group.weight_decay == expected["weight_decay"]
        else:
            assert isinstance(group, MuonGroup)
            assert expected["kind"] == "muon"


def test_five_steps_equal_the_goldens(facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Compiled steps are compared with these in `training/test_devices.py`."""
    model, optimizer = build()
    model.load_state_dict(golden(tensors, "param.0."))
    for step in facts["steps"]:
        number = step["step"]
        gradients = golden(tensors, f"grad.{number}.")
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        optimizer.step(step["lr_multiplier"], step["muon_momentum"], step["muon_weight_decay"])
        rounding_decided = 0
        for name, expected in golden(tensors, f"param.{number}.").items():
            difference = (model.get_parameter(name) - expected).abs()
            if name.startswith("blocks."):
                # Where the update is nearly 0, rounding decides the cautious decay's sign.
                rounding_decided += int((difference > 5e-6).sum())
                assert difference.max() < 1e-3, name
            else:
                assert difference.max() < 5e-6, name
        assert rounding_decided <= 5
    for theirs, ours in BUFFERS.items():
        for name, expected in golden(tensors, f"state.5.{theirs}.").items():
            actual = optimizer.state[f"{ours}.{name}"]
            torch.testing.assert_close(actual, expected, atol=5e-6, rtol=1e-5)
    assert sum(name.startswith("state.5.") for name in tensors) == len(optimizer.state)


def test_every_parameter_moves_and_is_in_one_group() -> None:
    model, optimizer = build()
    before = snapshot(dict(model.named_parameters()))
    backward(model, seed=0)
    optimizer.step(*SCHEDULE[0])
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    grouped = [name for group in optimizer.groups for name in group.names]
    assert sorted(grouped) == sorted(before)
    model.surprise = nn.Parameter(torch.ones(1))
    with pytest.raises(AssertionError, match="exactly one group"):
        build_groups(model, RATES)


def test_a_missing_gradient_counts_as_zero() -> None:
    results = []
    for missing in (None, torch.zeros(64, 64)):
        model, optimizer = build()
        backward(model, seed=0)
        model.get_parameter("blocks.0.attention.query.weight").grad = missing
        optimizer.step(*SCHEDULE[0])
        results.append(model.state_dict())
    assert_equal(*results)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bfloat16_tables_have_float32_state() -> None:
    model, optimizer = build(torch.bfloat16)
    backward(model, seed=0)
    optimizer.step(*SCHEDULE[0])
    assert model.token_embedding.weight.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in optimizer.state.values()} == {torch.float32}
    assert optimizer.muon_dtype == torch.bfloat16
    assert build(torch.float16)[1].muon_dtype == torch.float32


def train(model: Transformer, optimizer: Optimizer, steps: range) -> None:
    for i in steps:
        optimizer.zero_grad()
        backward(model, seed=i)
        optimizer.step(*SCHEDULE[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_state_continues_bit_for_bit(dtype: torch.dtype) -> None:
    model, optimizer = build(dtype)
    train(model, optimizer, range(2))
    weights = snapshot(model.state_dict())
    state = {"steps_taken": 2, **snapshot(optimizer.state)}
    assert optimizer.state_dict()["steps_taken"] == 2
    train(model, optimizer, range(2, 3))
    resumed, other = build(dtype)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    train(resumed, other, range(2, 3))
    assert_equal(resumed.state_dict(), model.state_dict())
    assert_equal(other.state, optimizer.state)
    assert other.steps_taken == 3


def test_loaded_state_is_a_copy() -> None:
    _, optimizer = build()
    saved = {name: torch.ones_like(buffer) for name, buffer in optimizer.state.items()}
    optimizer.load_state_dict({"steps_taken": 1, **saved})
    saved["mean.smear_lambda"] += 1
    assert optimizer.state["mean.smear_lambda"].item() == 1


def test_state_of_another_model_is_refused_and_changes_nothing() -> None:
    _, optimizer = build()
    before = snapshot(optimizer.state)
    state: dict[str, Any] = {name: torch.ones_like(buffer) for name, buffer in before.items()}
    state["steps_taken"] = 1
    missing = {name: buffer for name, buffer in state.items() if name != "mean.smear_lambda"}
    with pytest.raises(ValueError, match=r"does not fit this model; differing: .*smear_lambda"):
        optimizer.load_state_dict(missing)
    with pytest.raises(ValueError, match=r"differing: \['mean\.other'\]"):
        optimizer.load_state_dict(state | {"mean.other": torch.ones(1)})
    with pytest.raises(ValueError, match=r"mean\.smear_lambda is \(2,\) in the checkpoint, \(1,\)"):
        optimizer.load_state_dict(state | {"mean.smear_lambda": torch.ones(2)})
    assert optimizer.steps_taken == 0
    assert_equal(optimizer.state, before)


def test_grad_scaler_unscales_and_skips_overflowed_steps() -> None:
    (model, optimizer), (plain_model, plain) = build(), build()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    train(plain_model, plain, range(1))
    backward(model, seed=0, scale=scaler.scale)
    scaler.unscale_(optimizer)
    for parameter, expected in iterate_pairs(model, plain_model):
        torch.testing.assert_close(parameter.grad, expected.grad)
    scaler.step(optimizer, *SCHEDULE[0])
    scaler.update()
    assert optimizer.steps_taken == 1
    before, state = snapshot(model.state_dict()), snapshot(optimizer.state)

    backward(model, seed=1, scale=scaler.scale)
    smear = model.smear_lambda.grad
    assert smear is not None
    smear.fill_(torch.inf)
    scaler.step(optimizer, *SCHEDULE[1])
    scaler.update()
    assert optimizer.steps_taken == 1
    assert_equal(model.state_dict(), before)
    assert_equal(optimizer.state, state)
    assert scaler.get_scale() == 2.0**9


def iterate_pairs(a: nn.Module, b: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    return zip(a.parameters(), b.parameters(), strict=True)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_gpu_takes_the_same_steps(compile: bool) -> None:
    torch.compiler.reset()
    (model, _), (on_cpu, expected) = build(), build()
    model.cuda()
    optimizer = Optimizer(model, build_groups(model, RATES), compile=compile)
    train(on_cpu, expected, range(3))
    for i in range(3):
        backward(model, seed=i)
        optimizer.step(*SCHEDULE[i])
        optimizer.zero_grad()
    for parameter, wanted in iterate_pairs(model, on_cpu):
        torch.testing.assert_close(parameter.cpu(), wanted, atol=2e-3, rtol=1e-2)


def test_a_stack_in_parts_is_updated_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for elements in (2**25, 64 * 64):  # all matrices of a shape at once; one square matrix each
        monkeypatch.setattr(optimizer_module, "PART_ELEMENTS", elements)
        model, optimizer = build()
        for seed, settings in enumerate(SCHEDULE):
            optimizer.zero_grad()
            backward(model, seed)
            optimizer.step(*settings)
        states.append(snapshot(model.state_dict() | optimizer.state))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-6, rtol=1e-5, msg=name)


def step_tensor(step: int) -> Tensor:
    return torch.tensor(step, dtype=torch.int32)


def test_rounding_to_bfloat16_is_right_on_average_and_repeatable() -> None:
    values = 1 + torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2**-7
    target, again = (torch.empty_like(values, dtype=torch.bfloat16) for _ in range(2))
    store_square(target, values, step_tensor(3))
    assert ((target.float() - values).abs() < 2**-7).all()
    assert (target.double() - values.double()).mean().abs() < 2**-7 / 100
    store_square(again, values, step_tensor(3))
    assert torch.equal(again, target)
    store_square(again, values, step_tensor(4))
    assert not torch.equal(again, target)
    exact = torch.tensor([0.0, 1.0, -2.5, 2.0**-126])
    store_square(target[:4], exact, step_tensor(0))
    assert torch.equal(target[:4].float(), exact)


@pytest.mark.parametrize("every", [1, 200, 10**6])
def test_a_slow_average_in_bfloat16_follows_the_exact_one(every: int) -> None:
    """Also of a rare token's row, whose gradient is zero at most steps, or at all of them."""
    average, exact = torch.ones(4096, dtype=torch.bfloat16), torch.ones(4096)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 801):
        new = torch.rand(4096, generator=generator) if step % every == 0 else torch.zeros(4096)
        store_square(average, average.float().lerp(new, 0.005), step_tensor(step))
        exact.lerp_(new, 0.005)
    assert average.float().mean().item() == pytest.approx(exact.mean().item(), rel=0.02)


def test_moments_in_bfloat16_train_as_well_and_take_half_the_memory() -> None:
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = build(state_dtype=dtype)
        assert all(
            value.dtype == (torch.float32 if name.startswith("variance") else dtype)
            for name, value in optimizer.state.items()
        )
        for _ in range(25):
            optimizer.zero_grad()
            backward(model, 0)
            optimizer.step(0.2, 0.9, 0.0)
        token_ids = torch.randint(128, (2, 33), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            hidden = model.hidden(token_ids[:, :-1])
            weight, targets = model.unembedding.weight, token_ids[:, 1:]
            losses[dtype] = weighted_loss(hidden, weight, targets, 128).item()
        saved = snapshot(optimizer.state) | {"steps_taken": torch.tensor(25)}
        other = build(state_dtype=dtype)[1]
        other.load_state_dict(saved)
        assert_equal(other.state, optimizer.state)
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.1)
