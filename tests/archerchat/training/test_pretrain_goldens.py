"""The pretraining recipe against the reference's training curve, and its own parts."""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, SupportsFloat

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tests.archerchat.conftest import to_nanochat_names
from torch import Tensor

from archerchat.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from archerchat.commands.imports import ImportNanochatConfig, import_nanochat
from archerchat.console import ProgressLine
from archerchat.dial import DialConfig
from archerchat.exchange.nanochat import BUFFERS, to_archerchat_names
from archerchat.home import Home
from archerchat.tokenizer.bpe import Tokenizer, load_ranks
from archerchat.training.loop import Loop
from archerchat.training.pretrain import PretrainConfig, Pretraining
from archerchat.training.recipe import Recipe
from archerchat.training.resume import find_start
from archerchat.training.stage import CheckpointOptions
from archerchat.training.telemetry import MetricsLog

IMPORTED_STEP = 27
"""Step of 30 at which the golden run is imported from the reference's files: late saves time."""


@dataclass(frozen=True)
class Recorder(MetricsLog):
    """Keep what a run logs."""

    series: dict[str, dict[int, float]] = field(default_factory=dict)

    def log(self, values: Mapping[str, SupportsFloat], step: int) -> None:
        for name, value in values.items():
            self.series.setdefault(name, {})[step] = float(value)


class Saves:
    """Take the place of what writes checkpoints."""

    def __init__(self, save: Callable[[int], None] = lambda step: None) -> None:
        self._save = save

    def save(self, step: int, state: Any, finished: bool) -> None:
        self._save(step)

    is_writing = False

    def wait(self) -> None:
        pass

    def note_measured(self, step: int, loop: Any) -> None:
        pass

    def find(self, step: int) -> None:
        return None


def run_loop(
    config: PretrainConfig,
    tokenizer: Tokenizer,
    home: Home,
    prepare: Callable[[Recipe], Saves] = lambda recipe: Saves(),
) -> Recorder:
    """Train as `pretrain` does, but into memory."""
    tokenizer.save(home.tokenizer_dir(config.tokenizer))
    recipe = Pretraining(config, home)
    recipe.build(None)
    # The reference measures the initial weights too.
    recipe.evaluations = [replace(each, at_start=True) for each in recipe.evaluations]
    saves: Any = prepare(recipe)
    recipe.sample = lambda: {}  # type: ignore[method-assign]
    recorder = Recorder()
    progress = ProgressLine(Console(file=io.StringIO()), recipe.total_steps(0))
    with closing(recipe.loader):
        every = config.checkpoint.save_every
        loop = Loop(recipe, 1e11, every, config.sample_every)
        loop.run(saves, recorder, progress)
    return recorder


def restart_run(oracle_dir: Path, **settings: Any) -> tuple[dict[str, Any], PretrainConfig]:
    """Return the reference's record of `d4_dim128_restart`, and its settings here."""
    golden = json.loads((oracle_dir / "train_curve.json").read_text())["runs"]["d4_dim128_restart"]
    args = golden["args"]
    config = PretrainConfig(
        dial=DialConfig(
            depth=args["depth"],
            aspect_ratio=args["aspect_ratio"],
            head_dim=args["head_dim"],
            max_seq_len=args["max_seq_len"],
            num_iterations=args["num_iterations"],
            total_batch_size=args["total_batch_size"],
        ),
        data=str(oracle_dir / "corpus"),
        packing="best-fit",
        device="cpu",
        dtype="float32",
        compile=False,
        device_batch_size=args["device_batch_size"],
        eval_every=10,
        eval_tokens=16 * 8 * 256,
        checkpoint=CheckpointOptions(save_every=1),
        **settings,
    )
    return golden, config


def load_restart(recipe: Recipe, oracle_dir: Path) -> None:
    stored = to_archerchat_names(load_file(oracle_dir / "train_final.safetensors"))
    recipe.model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})


def as_nanochat_saves(
    directory: Path, step: int, recipe: Recipe, model_config: Mapping[str, Any]
) -> None:
    """Write a checkpoint in the reference's layout, of two ranks that share the optimizer."""
    torch.save(to_nanochat_names(recipe.model.state_dict()), directory / f"model_{step:06d}.pt")
    meta = {"step": step, "model_config": model_config}
    (directory / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    optimizer, names = recipe.optimizer, count()
    groups = [{"params": [next(names) for _ in group.names]} for group in optimizer.groups]
    for rank in range(2):
        state: dict[int, dict[str, Any]] = {}
        for group, numbered in zip(optimizer.groups, groups, strict=True):
            for name, number in zip(group.names, numbered["params"], strict=True):
                for theirs, ours in BUFFERS.items():
                    if (whole := optimizer.state.get(f"{ours}.{name}")) is not None:
                        rows = math.ceil(len(whole) / 2)
                        padded = torch.cat([whole, torch.zeros_like(whole[: len(whole) % 2])])
                        shared = theirs.endswith("buffer") or whole.numel() >= 1024
                        part = padded[rank * rows : (rank + 1) * rows] if shared else whole
                        state.setdefault(number, {})[theirs] = part.clone()
        torch.save(
            {"state": state, "param_groups": groups}, directory / f"optim_{step:06d}_rank{rank}.pt"
        )


@pytest.mark.slow
def test_the_reference_curve_from_trained_weights_and_from_an_import(
    oracle_dir: Path, tmp_path: Path
) -> None:
    """`d4_dim128_restart`: 30 steps of 8,192 tokens in float32, uncompiled, on the CPU's attention.

    Then the last three steps once more, from what nanochat would have saved before them.
    """
    golden, config = restart_run(oracle_dir, attention="matmul", extend=True, model_tag="d4")
    home, source = Home(tmp_path / "home"), tmp_path / "d4"
    source.mkdir()
    tokenizer = Tokenizer(load_ranks(oracle_dir / "tokenizer" / "mergeable_ranks.tiktoken"))
    norms: dict[int, dict[str, float]] = {}

    def prepare(recipe: Recipe) -> Saves:
        load_restart(recipe, oracle_dir)

        def save(step: int) -> None:
            norms[step] = parameter_norms(recipe)
            if step == IMPORTED_STEP:
                as_nanochat_saves(source, step, recipe, golden["model_config"])

        return Saves(save)

    recorder = run_loop(config, tokenizer, home, prepare)
    losses = [*recorder.series["train/last_micro_batch_loss"].values()]
    assert losses == pytest.approx(golden["loss"], abs=2e-5)
    expected = {entry["step"]: entry["val_bpb"] for entry in golden["val"]}
    assert recorder.series["val/bpb"] == pytest.approx(expected, abs=1e-5)
    for name in ("lr_multiplier", "muon_momentum"):
        assert [*recorder.series[f"train/{name}"].values()] == pytest.approx(golden[name])
    reference = {
        int(step): to_archerchat_names({n: torch.tensor(v).double() for n, v in values.items()})
        for step, values in golden["param_l2_after_n_steps"].items()
    }
    assert len(reference) > 1
    for step, theirs in reference.items():
        assert norms[step] == pytest.approx({n: v.item() for n, v in theirs.items()}, rel=1e-4)

    recipe, losses = continue_import(config, tokenizer, home, source)
    assert losses == pytest.approx(golden["loss"][IMPORTED_STEP:], abs=2e-5)
    assert parameter_norms(recipe) == pytest.approx(
        {n: v.item() for n, v in reference[30].items()}, rel=1e-4
    )


def parameter_norms(recipe: Recipe) -> dict[str, float]:
    named = recipe.model.named_parameters()
    return {name: value.detach().double().norm().item() for name, value in named}


def continue_import(
    config: PretrainConfig, tokenizer: Tokenizer, home: Home, source: Path
) -> tuple[Recipe, list[float]]:
    """Train from the step of the reference's files to the end; return the losses."""
    import_nanochat(ImportNanochatConfig(source), home)
    path = find_checkpoint(home.checkpoint_dir("base", "d4"))
    meta = load_checkpoint(path, ()).meta
    meta["tokenizer"] = {"name": config.tokenizer, "fingerprint": tokenizer.fingerprint}
    save_checkpoint(path.parent, IMPORTED_STEP, load_checkpoint(path).state, meta)
    stage, recorder = Pretraining(config, home), Recorder()
    start = find_start(stage)
    assert start is not None
    stage.build(start)
    recipe: Recipe = stage
    loop = Loop(recipe, 1e11)
    loop.load_state_dict(start.state)
    progress: Any = ProgressLine(Console(file=io.StringIO()), 30)
    saves: Any = Saves()
    with closing(recipe.loader):
        for _ in range(IMPORTED_STEP * 4):  # the golden run's text goes on
            next(recipe.loader)
        loop.run(saves, recorder, progress)
    losses = recorder.series["train/last_micro_batch_loss"]
    return recipe, [losses[step] for step in range(IMPORTED_STEP, 30)]


def test_four_micro_batches_of_two_rows_are_one_of_eight(tiny_home: Any) -> None:
    gradients: list[dict[str, Tensor]] = []

    def prepare(recipe: Recipe) -> Saves:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # the initial values hide half of the model
            for parameter in recipe.model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)

        def step(*settings: float) -> None:
            named = recipe.model.named_parameters()
            gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

        recipe.optimizer.step = step  # type: ignore[method-assign]
        return Saves()

    tokenizer = Tokenizer.load(tiny_home.tokenizer_dir("tiny"))
    config = functools.partial(
        PretrainConfig,
        dial=DialConfig(2, 16, 16, max_seq_len=64, num_iterations=1, total_batch_size=8 * 64),
        data="tiny",
        device="cpu",
        dtype="float32",
        compile=False,
        eval_every=None,
        eval_tokens=64,
    )
    for rows in (2, 8):
        run_loop(config(device_batch_size=rows), tokenizer, tiny_home, prepare)
    few, many = gradients
    assert few.keys() == many.keys()
    assert len(few) > 20
    for name, gradient in many.items():
        torch.testing.assert_close(few[name], gradient, rtol=1e-5, atol=1e-7)
