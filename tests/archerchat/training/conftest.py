"""What the tests of whole training runs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from archerchat.checkpoint import find_checkpoint, load_checkpoint
from archerchat.config import compare_configs

SECTIONS = {"model", "optimizer", "loader", "rng", "loop", "scaler"}


@pytest.fixture
def assert_same_run() -> Callable[..., None]:
    """Compare all that the last checkpoints of two models hold, times excepted."""

    def compare(left: Path, right: Path, step: int | None = None) -> None:
        first, second = (load_checkpoint(find_checkpoint(path, step)) for path in (left, right))
        assert first.step == second.step
        assert first.state.keys() == second.state.keys() == SECTIONS
        for section, values in first.state.items():
            others = second.state[section]
            assert others.keys() == values.keys()
            for name, value in values.items():
                if isinstance(value, Tensor):
                    assert others[name].dtype == value.dtype
                    assert torch.equal(others[name], value), f"{section}: {name}"
                elif name != "training_seconds":
                    assert compare_configs({name: value}, {name: others[name]}) == [], section
        for meta in (first.meta, second.meta):
            del meta["config"]
        assert compare_configs(first.meta, second.meta) == []

    return compare
