"""Rows per micro-batch: all stages choose them alike, and a resumed run may choose again."""

from __future__ import annotations

import math
import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from archerchat.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, save_checkpoint
from archerchat.dial import DialConfig, build_hyperparameters
from archerchat.distributed import Ranks
from archerchat.model.transformer import Transformer
from archerchat.planning.memory import RESERVED_SHARE, estimate_memory
from archerchat.runtime import Runtime
from archerchat.training import stage as stage_module
from archerchat.training.recipe import Recipe
from archerchat.training.stage import Stage

SHARED = ["--device", "cpu", "--dtype", "float32", "--no-compile", "--model-tag", "tiny"]
SHARED += ["--save-every", "1", "--num-iterations", "2", "--eval-every", "none", "--keep-last", "9"]
WORDS = {
    "base": ["pretrain", "--data", "tiny", "--tokenizer", "tiny", "--total-batch-size", "512"],
    "sft": ["sft", "--mixture", "Arithmetic:200"],
    "rl": ["rl", "--source", "base", "--task", "Arithmetic", "--num-samples", "4"],
}
WORDS["base"] += ["--depth", "2", "--aspect-ratio", "16", "--head-dim", "16", "--max-seq-len", "64"]
WORDS["rl"] += ["--examples-per-step", "4", "--max-new-tokens", "4"]


def run(home: Any, stage: str, *more: str) -> int:
    code: int = home.run(*WORDS[stage], *SHARED, "--sample-every", "none", *more)
    return code


def last(home: Any, stage: str) -> Checkpoint:
    return load_checkpoint(find_checkpoint(home.checkpoint_dir(stage, "tiny")))


def rows(home: Any, stage: str) -> int:
    identity = last(home, stage).meta["identity"]
    return int(identity.get("rollouts", identity)["device_batch_size"])


def use_rows(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let so many rows be the most that make sense on a CPU."""
    monkeypatch.setattr("archerchat.planning.memory.CPU_TOKENS", count * 64)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["base", "rl"])
def test_a_run_takes_what_fits_and_keeps_it_until_it_moves(
    tiny_home: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    if stage == "rl":
        assert tiny_home.pretrain() == 0
    use_rows(monkeypatch, 2)
    assert run(tiny_home, stage) == 0
    assert rows(tiny_home, stage) == 2
    whole = last(tiny_home, stage).state
    use_rows(monkeypatch, 8)
    for machine, expected in ((None, 2), ("another CPU", 8)):
        shutil.rmtree(tiny_home.checkpoint_dir(stage, "tiny") / "step_000002")
        if machine:
            monkeypatch.setattr("archerchat.runtime._device_name", lambda _, name=machine: name)
        capsys.readouterr()
        assert run(tiny_home, stage) == 0
        assert ("not bit for bit after this point" in capsys.readouterr().out) == bool(machine)
        assert rows(tiny_home, stage) == expected
        again = last(tiny_home, stage).state
        assert again["loop"]["tokens"] == whole["loop"]["tokens"]
        for name, tensor in whole["model"].items():
            if machine is None:
                assert torch.equal(again["model"][name], tensor)
            elif name != "backout_lambda":  # rounding decides its gradient
                torch.testing.assert_close(again["model"][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", WORDS)
def test_every_stage_halves_its_rows_until_a_step_fits(
    trained_home: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
) -> None:
    use_small_card(monkeypatch, 1)
    use_rows(monkeypatch, 4)
    # Of answers that are all wrong there would be nothing to learn.
    advantages = "archerchat.training.rollouts.group_advantages"
    monkeypatch.setattr(advantages, lambda rewards: [1.0, -1.0] * (len(rewards) // 2))
    assert run(trained_home, stage, "--overwrite") == 0
    output = capsys.readouterr().out
    assert re.findall(r"starting again with (\d) rows", output) == ["2", "1"]
    assert rows(trained_home, stage) == 1
    config = last(trained_home, stage).meta["config"]
    assert config["device_batch_size"] == "auto"  # another card may take more
    assert run(trained_home, stage) == 0  # finished, with the rows as they became


def test_a_run_that_starts_again_still_computes_layers_again(
    trained_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, hidden = stage_module.fit_micro_batch, Recipe.hidden

    def needs_recomputing(*given: Any, **named: Any) -> Any:
        estimate, count, _ = fit(*given, **named)
        return estimate, count, True

    def limited(recipe: Recipe, inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs) > 2 or not recipe.model.recomputes:
            raise torch.OutOfMemoryError("8 GiB")
        return hidden(recipe, inputs)

    use_rows(monkeypatch, 4)
    monkeypatch.setattr(stage_module, "fit_micro_batch", needs_recomputing)
    monkeypatch.setattr(Recipe, "hidden", limited)
    assert run(trained_home, "base", "--overwrite") == 0
    assert rows(trained_home, "base") == 2


def use_small_card(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let memory run out where a micro-batch has more rows, or where an earlier model is kept."""
    hidden = Recipe.hidden
    models: list[weakref.ref[Transformer]] = []

    def limited(recipe: Recipe, inputs: torch.Tensor) -> torch.Tensor:
        assert all(model() in (recipe.model, None) for model in models), "not freed"
        if len(inputs) > most:
            models.append(weakref.ref(recipe.model))
            raise torch.OutOfMemoryError("8 GiB")
        return hidden(recipe, inputs)

    monkeypatch.setattr(Recipe, "hidden", limited)


def test_rows_that_were_given_or_cannot_be_fewer_are_not_tried_again(
    tiny_home: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_rows(monkeypatch, 4)
    for most, words in ((2, ["--device-batch-size", "4"]), (0, [])):
        use_small_card(monkeypatch, most)
        assert run(tiny_home, "base", *words) == 1
        output = capsys.readouterr()
        assert "lower --device-batch-size" in output.err
        assert ("starting again with 1 rows" in output.out) == (most == 0)


def test_fine_tuning_takes_the_base_model_s_rows_where_they_fit(
    trained_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_rows(monkeypatch, 1)  # says what is useful, not what fits
    assert run(trained_home, "sft") == 0
    assert rows(trained_home, "sft") == 4
    assert run(trained_home, "sft", "--device-batch-size", "8") == 2  # other rows, other loss
    hp = build_hyperparameters(DialConfig(2, 16, 16, max_seq_len=64, num_iterations=4), 360)
    estimate = estimate_memory(hp.model, torch.float32, torch.device("cpu"))
    small = math.ceil(estimate.total(2) / (1 - RESERVED_SHARE))
    monkeypatch.setattr(Runtime, "total_memory_bytes", lambda runtime: small)
    use_rows(monkeypatch, 8)
    assert run(trained_home, "sft", "--overwrite") == 0
    assert rows(trained_home, "sft") == 2
    monkeypatch.undo()
    monkeypatch.setattr("archerchat.runtime._device_name", lambda device: "another CPU")
    shutil.rmtree(trained_home.checkpoint_dir("sft", "tiny") / "step_000002")
    assert run(trained_home, "sft") == 0  # as many as it began with, no more
    assert rows(trained_home, "sft") == 2


def test_each_stream_of_data_still_gives_whole_micro_batches(tmp_path: Path) -> None:
    """Four ranks began a run of 16 rows a step; one process elsewhere may take 4 at a time."""
    meta = {"identity": {"device_batch_size": 2}, "hardware": {"device": "another CPU"}}
    loader = {"streams": 4, "tokens": torch.zeros(1)}
    saved = load_checkpoint(save_checkpoint(tmp_path, 1, {"loader": loader}, meta), sections=())
    hp = build_hyperparameters(DialConfig(2, 16, 16, max_seq_len=64, num_iterations=4), 360)
    runtime = Runtime(torch.device("cpu"), torch.float32, "a CPU", "forced")
    stage: Any = SimpleNamespace(
        runtime=runtime,
        ranks=Ranks(),
        model_config=hp.model,
        saved=None,
        saved_rows=0,
        most_rows=None,
        count_micro_batches=lambda rows: 16 // rows,
        recomputes=False,
        state_dtype=torch.float32,
    )
    Stage.choose_rows(stage)
    assert stage.rows == 16
    stage.saved, stage.saved_rows = saved, 2
    Stage.choose_rows(stage)
    assert (stage.rows, stage.recomputes) == (4, False)
