"""A model is found by its name, with the tokenizer it was trained with."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from archerchat.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from archerchat.errors import CheckpointError, TokenizerError, UsageError
from archerchat.inference.loading import load_model
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
    with pytest.raises(UsageError, match=r"no sft model under .*: train or import one first"):
        load_model(trained_home, runtime, "sft", None)


def test_another_tokenizer_under_the_same_name_is_refused(
    trained_home: Any, runtime: Runtime
) -> None:
    directory = trained_home.tokenizer_dir("tiny")
    train_tokenizer(["as good as new, but another"], 270).save(directory)
    with pytest.raises(TokenizerError, match=r"'tiny' is not the one that .*step_000004 was"):
        load_model(trained_home, runtime, "base", "tiny")
    shutil.rmtree(directory)
    with pytest.raises(TokenizerError, match=r"cannot read .*tokenizer\.json"):
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
