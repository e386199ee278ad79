"""What a run begins with, whatever its recipe."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from archerchat.checkpoint import Checkpoint
from archerchat.training.model_recipe import ModelRecipe
from archerchat.training.recipe import LoopState
from archerchat.training.run import begin_run


class RestoredRecipe:
    """Restores the step alone, and says what it was given."""

    def __init__(self) -> None:
        self.meta = {"compile": False}
        self.given: list[Any] = []

    def restore(self, checkpoint: Checkpoint, extend: bool) -> tuple[LoopState, dict[str, Any]]:
        self.given = [sorted(checkpoint.tensors), extend]
        return LoopState(step=checkpoint.step), {"scale": 2.0}


def test_a_new_run_begins_at_step_0_with_the_seed_s_generators() -> None:
    recipe = RestoredRecipe()
    beginning = begin_run(cast(ModelRecipe, recipe), None, 7, Console(file=io.StringIO()))
    drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert (beginning.state.step, beginning.scaler, beginning.checkpoint) == (0, None, None)
    assert recipe.given == []


def test_a_resumed_run_says_where_it_goes_on_and_lets_the_tensors_go(tmp_path: Path) -> None:
    recipe, output, path = RestoredRecipe(), io.StringIO(), tmp_path / "step_000005"
    start = Checkpoint(5, path, {"model": {"weight": torch.ones(2)}}, {"compile": True})
    console = Console(file=output, soft_wrap=True)
    beginning = begin_run(cast(ModelRecipe, recipe), start, 7, console, extend=True)
    assert recipe.given == [["model"], True]
    assert (beginning.state.step, beginning.scaler) == (5, {"scale": 2.0})
    assert beginning.checkpoint == path
    assert start.tensors == {}
    assert f"going on from {path}" in output.getvalue()
    assert "not to the last bit from here: compile: True saved, False now" in output.getvalue()
