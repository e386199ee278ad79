"""Models are found by name with their tokenizer; weights cast once compute the same."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import nn

from archerchat.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from archerchat.errors import CheckpointError, TokenizerError, UsageError
from archerchat.inference import loading
from archerchat.inference.loading import (
    build_inference_model,
    can_pack,
    load_model,
    refresh_weights,
)
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Linear
from archerchat.runtime import Runtime, build_runtime
from archerchat.tokenizer.bpe import train_tokenizer


@pytest.fixture
def runtime() -> Runtime:
    return build_runtime("cpu", "float32")


@pytest.mark.parametrize(("step", "expected"), [(None, 4), (2, 2)])
def test_a_model_is_loaded_for_inference(
    trained_home: Any, runtime: Runtime, step: int | None, expected: int
) -> None:
    loaded = load_model(trained_home, runtime, "base", "tiny", step)
    assert loaded.step == expected
    assert loaded.path == trained_home.checkpoint_dir("base", "tiny") / f"step_00000{expected}"
    assert loaded.tokenizer.vocab_size == loaded.model.config.vocab_size == 360
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    saved = load_checkpoint(loaded.path, ["model"]).state["model"]
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    assert load_model(trained_home, runtime, "base", None, step).path == loaded.path


def test_a_dtype_other_than_in_training_is_possible(trained_home: Any) -> None:
    wide, narrow = (
        load_model(trained_home, build_runtime("cpu", dtype), "base", "tiny").model
        for dtype in ("float32", "bfloat16")
    )
    assert narrow.token_embedding.weight.dtype == torch.bfloat16
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(narrow(ids), wide(ids), atol=0.15, rtol=0)


def test_an_unknown_name_or_step_says_what_there_is(trained_home: Any, runtime: Runtime) -> None:
    with pytest.raises(UsageError, match=r"no base model 'big' under .*; there is tiny"):
        load_model(trained_home, runtime, "base", "big")
    with pytest.raises(UsageError, match=r"no step 3 in .*; it holds 2, 4"):
        load_model(trained_home, runtime, "base", "tiny", 3)
    without = (
        r"no sft model under .*: make one with `archerchat sft`, or import one; "
        r"there is a base model, which --source base uses$"
    )
    with pytest.raises(UsageError, match=without):
        load_model(trained_home, runtime, "sft", None)


def test_another_tokenizer_under_the_same_name_is_refused(
    trained_home: Any, runtime: Runtime
) -> None:
    directory = trained_home.tokenizer_dir("tiny")
    train_tokenizer(["as good as new, but another"], 270).save(directory)
    with pytest.raises(TokenizerError, match=r"'tiny' is not the one that .*step_000004 was"):
        load_model(trained_home, runtime, "base", "tiny")
    shutil.rmtree(directory)
    with pytest.raises(TokenizerError, match=r"cannot load a tokenizer: .*tokenizer\.json"):
        load_model(trained_home, runtime, "base", "tiny")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokenizer": None}, UsageError, "imported without its tokenizer"),
        ({"model_config": {"num_layers": 2}}, CheckpointError, "does not hold a model"),
        ({"model_config": None}, CheckpointError, "does not hold a model"),
        ({"model_config": {"num_heads": 0}}, CheckpointError, "does not hold a model"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    trained_home: Any, runtime: Runtime, changes: dict[str, Any], error: Any, message: str
) -> None:
    directory = trained_home.checkpoint_dir("base", "tiny")
    saved = load_checkpoint(find_checkpoint(directory))
    if changes.get("model_config") == {"num_heads": 0}:
        changes = {"model_config": saved.meta["model_config"] | changes["model_config"]}
    save_checkpoint(directory, 5, saved.state, saved.meta | changes)
    with pytest.raises(error, match=f"step_000005 .*{message}"):
        load_model(trained_home, runtime, "base", "tiny")


def test_weights_of_another_shape_are_refused(trained_home: Any, runtime: Runtime) -> None:
    directory = trained_home.checkpoint_dir("base", "tiny")
    saved = load_checkpoint(find_checkpoint(directory))
    del saved.state["model"]["smear_lambda"]
    save_checkpoint(directory, 5, saved.state, saved.meta)
    with pytest.raises(CheckpointError, match=r"does not hold a model: .*smear_lambda"):
        load_model(trained_home, runtime, "base", "tiny")


SHAPE = ModelConfig(64, 100, 2, 2, 2, 64)
IDS = torch.arange(60)[None] % 100


def test_in_float32_the_model_serves_itself(build: Any) -> None:
    model = build(SHAPE)
    assert build_inference_model(model) is model


def cast_bytes(model: nn.Module) -> set[torch.dtype]:
    return {m.weight.dtype for m in model.modules() if isinstance(m, Linear)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plainly_cast_weights_give_the_same_bits(
    build: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(loading, "can_pack", lambda *_: False)
    model = build(SHAPE, dtype=dtype)
    model.backend = "sdpa"
    for block in model.blocks:
        block.attention.backend = "sdpa"  # float16 has no room for `matmul`
    fixed = build_inference_model(model)
    assert not any(getattr(module, "packed", False) for module in fixed.modules())
    assert cast_bytes(fixed) == {dtype}
    assert cast_bytes(model) == {torch.float32}
    assert torch.equal(fixed(IDS), model(IDS))
    assert fixed.token_embedding.weight is model.token_embedding.weight
    assert fixed.device == model.device


@pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="this torch does not pack bfloat16"
)
def test_packed_weights_give_the_same_within_rounding(build: Any) -> None:
    model = build(SHAPE, dtype=torch.bfloat16)
    fixed = build_inference_model(model)
    assert sum(getattr(module, "packed", False) for module in fixed.modules()) == 6 * 2 + 1
    torch.testing.assert_close(fixed(IDS), model(IDS), atol=0.15, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_a_refresh_takes_new_weights_over(
    build: Any, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    if not packed:
        monkeypatch.setattr(loading, "can_pack", lambda *_: False)
    model, other = build(SHAPE, 0, torch.bfloat16), build(SHAPE, 3, torch.bfloat16)
    fixed = build_inference_model(model)
    before = fixed(IDS)
    model.load_state_dict(other.state_dict())
    refresh_weights(fixed)
    assert torch.equal(fixed(IDS), build_inference_model(other)(IDS))
    assert not torch.equal(fixed(IDS), before)


def test_nothing_else_is_packed() -> None:
    cpu = torch.device("cpu")
    assert not can_pack(cpu, torch.float32)
    assert not can_pack(cpu, torch.float16)
    assert not can_pack(torch.device("cuda"), torch.bfloat16)
