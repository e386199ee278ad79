"""Whether a card learns what the reference learned: 200 steps on the golden corpus in bfloat16.

The batches are the golden run's own, packed beforehand (`--pack`), so that neither Parquet nor the
packer is needed where this runs. The same initial weights, the same schedule: the final bits per
byte must be within 0.03 of the reference's.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from archerchat.console import ProgressLine
from archerchat.data.prefetch import Batch
from archerchat.dial import DialConfig, build_hyperparameters
from archerchat.model.attention import choose_backend
from archerchat.model.transformer import Transformer
from archerchat.optim.optimizer import Optimizer, build_groups
from archerchat.optim.schedule import Schedule, build_schedule
from archerchat.runtime import Runtime
from archerchat.training.loop import Loop
from archerchat.training.recipe import Evaluation, Recipe, StepSettings
from archerchat.training.resume import CheckpointWriter
from archerchat.training.telemetry import MetricsLog
from gpu_common import BUNDLE, DRY_RUN, open_rows, start
from models import load_golden_tokenizer, load_golden_weights

GOLDEN = "d4_dim128_b16"
ORACLE = BUNDLE / "shared" / "oracle"
PACKED = BUNDLE / "learning.npz"
ROWS, LENGTH, ACCUM, STEPS, VALIDATION = 8, 256, 4, 200, 16
"""The golden run's micro-batches, steps and batches of validation."""
RUN_STEPS, VALIDATED, RUNS = (2, 1, 2) if DRY_RUN else (STEPS, VALIDATION, 3)
DTYPE = "float32" if DRY_RUN else "bfloat16"
"""CPUs without bfloat16 take minutes for a step in it."""


def pack(oracle: Path, target: Path) -> None:
    """Write the golden run's batches, as rows of T + 1 token ids."""
    from archerchat.data.text_loader import TextLoader

    shards = sorted((oracle / "corpus").glob("*.parquet"))
    tokenizer = load_golden_tokenizer(oracle)

    def rows(shards: list[Path], count: int) -> NDArray[np.uint16]:
        with TextLoader(shards, tokenizer, batch_size=ROWS, sequence_length=LENGTH) as loader:
            batches = [next(loader) for _ in range(count)]
        parts = [np.concatenate([b.inputs, b.targets[:, -1:]], axis=1) for b in batches]
        return np.concatenate(parts).astype(np.uint16)

    train = rows(shards[:-1], STEPS * ACCUM)
    np.savez_compressed(target, train=train, validation=rows(shards[-1:], VALIDATION))


class PackedLoader:
    """Yield batches of packed rows; nothing resumes here, so there is no state."""

    def __init__(self, rows: NDArray[np.uint16]) -> None:
        self._batches = iter(batches(rows))

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def batches(rows: NDArray[np.uint16]) -> Iterator[Batch]:
    wide = rows.astype(np.int64)
    for part in np.split(wide, len(wide) // ROWS):
        yield Batch(np.stack([part[:, :-1], part[:, 1:]]))


@dataclass(kw_only=True)
class LearningRecipe(Recipe):
    """Train on packed rows with the golden run's schedule."""

    schedule: Schedule

    def total_steps(self, step: int) -> int:
        return RUN_STEPS

    def settings(self, step: int) -> StepSettings:
        schedule = self.schedule
        return StepSettings(
            schedule.lr_multiplier(step),
            schedule.muon_momentum(step),
            schedule.muon_weight_decay(step),
        )

    def step_tokens(self) -> int:
        return ROWS * LENGTH * ACCUM

    def sample(self) -> Mapping[str, str]:
        return {}


@dataclass(frozen=True)
class Recorder(MetricsLog):
    """Keep the losses in memory."""

    losses: list[float] = field(default_factory=list)

    def log(self, values: Mapping[str, SupportsFloat], step: int) -> None:
        if "train/last_micro_batch_loss" in values:
            self.losses.append(float(values["train/last_micro_batch_loss"]))


class NoCheckpoints(CheckpointWriter):
    """Save nothing."""

    def save(self, step: int, state: Mapping[str, Mapping[str, Any]], finished: bool) -> None:
        pass


def learn(runtime: Runtime, seed: int) -> dict[str, Any]:
    """Train; return the final bits per byte beside the reference's.

    Two hundred steps at these rates are chaotic: a seed above 0 moves the initial weights by a
    part in a hundred thousand, to show how far such runs part.
    """
    golden = json.loads((ORACLE / "train_curve.json").read_text())["runs"][GOLDEN]
    names = ("depth", "aspect_ratio", "head_dim", "max_seq_len", "num_iterations")
    dial = DialConfig(
        **{name: golden["args"][name] for name in names},
        total_batch_size=golden["args"]["total_batch_size"],
    )
    tokenizer = load_golden_tokenizer(ORACLE)
    hp = build_hyperparameters(dial, tokenizer.vocab_size)
    backend, _ = choose_backend(runtime.device, runtime.compute_dtype)
    model = Transformer(hp.model, runtime.compute_dtype, backend)
    model.load_state_dict(load_golden_weights(ORACLE / "train_init.safetensors"))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = 1 + 1e-5 * torch.randn(parameter.shape, generator=generator) * bool(seed)
        parameter.data.mul_(noise)
    model.to(runtime.device)
    packed = np.load(PACKED)
    recipe = LearningRecipe(
        runtime=runtime,
        model=model,
        optimizer=Optimizer(
            model,
            build_groups(model, hp.learning_rates),
            runtime.compute_dtype,
            compile=not DRY_RUN,
        ),
        loader=PackedLoader(packed["train"]),
        tokenizer=tokenizer,
        grad_accum_steps=ACCUM,
        compile=not DRY_RUN,
        schedule=build_schedule(dial, hp),
    )
    validation = packed["validation"][: ROWS * VALIDATED]
    recipe.evaluations = [
        Evaluation(lambda: {"val/bpb": recipe.bits_per_byte(batches(validation))}, None)
    ]
    recorder = Recorder()
    with (
        tempfile.TemporaryDirectory(prefix="archerchat-gpu-") as folder,
        ProgressLine(Console(stderr=True), RUN_STEPS) as progress,
    ):
        loop = Loop(recipe, math.nan)
        loop.run(NoCheckpoints(Path(folder), {}, 1), recorder, progress)
    return {
        "backend": backend,
        "val_bpb": loop.state.last_val,
        "val_bpb_reference": golden["val"][-1]["val_bpb"],
        "first_loss_difference": abs(recorder.losses[0] - golden["loss"][0]),
        "tokens_per_second": round(loop.speed.tokens_per_second),
    }


def main() -> None:
    if sys.argv[1:2] == ["--pack"]:
        pack(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    rows, _ = open_rows()
    for seed in range(RUNS):
        rows.measure(f"d4 golden {seed}", lambda seed=seed: learn(start(DTYPE), seed))  # type: ignore[misc]


if __name__ == "__main__":
    main()
