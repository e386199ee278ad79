"""The pretraining recipe against the reference's training curve, and its own parts."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from archerchat.console import ProgressLine
from archerchat.dial import DialConfig
from archerchat.exchange.nanochat import to_archerchat_names
from archerchat.home import Home
from archerchat.planning.peak_flops import PeakFlops
from archerchat.tokenizer.bpe import Tokenizer, load_ranks
from archerchat.training.loop import Loop
from archerchat.training.pretrain import PretrainConfig, Pretraining
from archerchat.training.recipe import Recipe
from archerchat.training.telemetry import MetricsLog


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
    recipe = Pretraining(config, home, tokenizer=tokenizer).build_recipe(None)
    saves: Any = prepare(recipe)
    recipe.sample = lambda step: {}  # type: ignore[method-assign]
    recorder = Recorder(None)
    progress = ProgressLine(Console(file=io.StringIO()), recipe.total_steps(0))
    with closing(recipe.loader):
        loop = Loop(recipe, PeakFlops(1e11, "table"), config.save_every, config.sample_every)
        loop.run(saves, recorder, progress)
    return recorder


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
def test_the_reference_curve_from_trained_weights(
    oracle_dir: Path, tmp_path: Path, attention: Any
) -> None:
    """`d4_dim128_restart`: 30 steps of 8,192 tokens in float32, uncompiled."""
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
        attention=attention,
        compile=False,
        device_batch_size=args["device_batch_size"],
        eval_every=10,
        eval_tokens=16 * 8 * 256,
        save_every=1,
    )
    stored = to_archerchat_names(load_file(oracle_dir / "train_final.safetensors"))
    norms: dict[int, dict[str, float]] = {}

    def prepare(recipe: Recipe) -> Saves:
        recipe.model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
        parameters = dict(recipe.model.named_parameters())

        def save(step: int) -> None:
            norms[step] = {n: p.detach().double().norm().item() for n, p in parameters.items()}

        return Saves(save)

    ranks = load_ranks(oracle_dir / "tokenizer" / "mergeable_ranks.tiktoken")
    recorder = run_loop(config, Tokenizer(ranks), Home(tmp_path), prepare)
    losses = [*recorder.series["train/last_micro_batch_loss"].values()]
    assert losses == pytest.approx(golden["loss"], abs=2e-5)
    expected = {entry["step"]: entry["val_bpb"] for entry in golden["val"]}
    assert recorder.series["val/bpb"] == pytest.approx(expected, abs=1e-5)
    for name in ("lr_multiplier", "muon_momentum"):
        assert [*recorder.series[f"train/{name}"].values()] == pytest.approx(golden[name])
    assert len(golden["param_l2_after_n_steps"]) > 1
    for step, reference in golden["param_l2_after_n_steps"].items():
        ours = to_archerchat_names({n: torch.tensor(v).double() for n, v in reference.items()})
        assert norms[int(step)] == pytest.approx(
            {name: norm.item() for name, norm in ours.items()}, rel=1e-4
        )


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
