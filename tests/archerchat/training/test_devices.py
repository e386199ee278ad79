"""Training on each kind of device: the loop, checkpoints, float16, steps that do not wait."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from archerchat.checkpoint import find_checkpoint, load_checkpoint
from archerchat.console import ProgressLine
from archerchat.data.prefetch import Batch
from archerchat.dial import DialConfig, Hyperparameters, build_hyperparameters
from archerchat.model.attention import choose_backend
from archerchat.model.loss import weighted_loss
from archerchat.model.transformer import Transformer
from archerchat.optim import optimizer as optimizer_module
from archerchat.optim.optimizer import Optimizer, build_groups
from archerchat.runtime import Runtime, build_runtime, prepare_process
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.training.loop import Loop
from archerchat.training.recipe import Evaluation, Recipe, StepSettings
from archerchat.training.resume import CheckpointWriter
from archerchat.training.telemetry import MetricsLog

pytestmark = pytest.mark.filterwarnings("error::archerchat.model.compiling.CompileWarning")
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
TOKENIZER = Tokenizer({bytes([value]): value for value in range(256)})
ROWS = 2


def hyperparameters(device: str) -> Hyperparameters:
    """Return a small model's; on CPUs a tiny one's."""
    size = (32, 16, 16) if device == "cpu" else (256, 43, 32)
    length, aspect_ratio, head_dim = size
    dial = DialConfig(
        3,
        aspect_ratio=aspect_ratio,
        head_dim=head_dim,
        max_seq_len=length,
        num_iterations=20,
    )
    return build_hyperparameters(dial, TOKENIZER.vocab_size)


class RepeatingLoader:
    """Yield text that repeats itself, so that a model soon predicts it; a number is its state."""

    def __init__(self, length: int) -> None:
        self.length, self.done = length, 0

    def __next__(self) -> Batch:
        self.done += 1
        words = np.random.default_rng(self.done % 3).integers(97, 123, (ROWS, 8))
        rows = np.tile(words, (1, self.length // 8 + 1))[:, : self.length + 1]
        return Batch(np.stack([rows[:, :-1], rows[:, 1:]]))

    def close(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.done = state["done"]


@dataclass(kw_only=True)
class SmallRecipe(Recipe):
    """Train for some steps at a constant rate."""

    steps: int = 20

    def total_steps(self, step: int) -> int:
        return self.steps

    def settings(self, step: int) -> StepSettings:
        return StepSettings(0.3, 0.9, 0.1)

    def step_tokens(self) -> int:
        return ROWS * self.model.config.sequence_length * self.grad_accum_steps

    def sample(self) -> Mapping[str, str]:
        return {}


@dataclass(frozen=True)
class Losses(MetricsLog):
    """Keep the metrics of each step."""

    kept: dict[str, list[float]] = field(default_factory=dict)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        for name, value in values.items():
            self.kept.setdefault(name, []).append(float(value))


@contextmanager
def precision(level: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def build(runtime: Runtime, steps: int = 20) -> SmallRecipe:
    """Return a recipe on a small model, compiled on CUDA."""
    backend, _ = choose_backend(runtime.device, runtime.compute_dtype)
    hp, generator = hyperparameters(runtime.device.type), torch.Generator().manual_seed(0)
    model = Transformer(hp.model, runtime.compute_dtype, backend)
    model.init_weights(0)
    with torch.no_grad():  # away from zeros, where rounding alone decides the first gradients
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.to(runtime.device)
    fast = runtime.device.type == "cuda"
    groups = build_groups(model, hp.learning_rates)
    return SmallRecipe(
        runtime=runtime,
        model=model,
        optimizer=Optimizer(model, groups, runtime.compute_dtype, compile=fast),
        loader=RepeatingLoader(hp.model.sequence_length),
        tokenizer=TOKENIZER,
        grad_accum_steps=2,
        compile=fast,
        steps=steps,
    )


def run(recipe: SmallRecipe, directory: Path, start: Path | None = None) -> dict[str, list[float]]:
    """Train, from a checkpoint if one is given, and save at the end; return the metrics."""
    loop = Loop(recipe, 1e12, save_every=10)
    if start is not None:
        loop.load_state_dict(load_checkpoint(start).state)
    metrics = Losses(None)
    with ProgressLine(Console(quiet=True), recipe.steps) as progress:
        assert loop.run(CheckpointWriter(directory, {}, 2), metrics, progress)
    return metrics.kept


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", "float32"),
        pytest.param("cpu", "bfloat16", marks=pytest.mark.slow),
        *(
            pytest.param("cuda", dtype, marks=pytest.mark.gpu)
            for dtype in ("float32", "bfloat16", "float16")
        ),
    ],
)
def test_twenty_steps_with_a_resume_in_the_middle(device: str, dtype: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    runtime = build_runtime(device, dtype)
    whole = build(runtime)
    loader = RepeatingLoader(whole.model.config.sequence_length)
    batches = [next(loader) for _ in range(2)]
    whole.evaluations = [Evaluation(lambda: {"val/bpb": whole.bits_per_byte(batches)}, 10)]
    expected = run(whole, tmp_path / "whole")
    losses = expected["train/loss"]
    assert len(losses) == 20
    assert losses[-1] < 0.8 * losses[0]
    assert expected["val/bpb"][-1] < expected["val/bpb"][0]
    assert min(expected["train/memory_bytes"]) > 0
    assert ("train/grad_scale" in expected) == (dtype == "float16")
    second, middle = build(runtime), find_checkpoint(tmp_path / "whole", 10)
    resumed = run(second, tmp_path / "second", start=middle)["train/loss"]
    bound = 0.0 if device == "cpu" else 0.02
    assert resumed == pytest.approx(losses[10:], abs=bound)
    saved = load_checkpoint(find_checkpoint(tmp_path / "second")).state
    assert ("cuda" in saved["rng"]) == torch.cuda.is_available()
    for name, parameter in whole.model.named_parameters():
        other = second.model.get_parameter(name)
        assert other.device == parameter.device
        assert (other - parameter).norm() <= bound * parameter.norm() + 1e-3 * bound, name


@pytest.mark.parametrize("device", DEVICES)
def test_float16_learns_what_float32_learns(device: str, tmp_path: Path) -> None:
    with precision("highest"):
        torch.compiler.reset()
        runs = {
            dtype: run(build(build_runtime(device, dtype), steps=10), tmp_path / dtype)
            for dtype in ("float32", "float16")
        }
    kept = runs["float16"]["train/loss"]
    skipped = sum(a > b for a, b in zip(
        [2.0**16, *runs["float16"]["train/grad_scale"]], runs["float16"]["train/grad_scale"],
        strict=False,
    ))  # fmt: skip
    count = 10 - skipped
    assert count >= 6  # the first scales may be too large for a step or two
    assert kept[-1] == pytest.approx(runs["float32"]["train/loss"][count - 1], abs=0.3)


def loss_of(recipe: SmallRecipe, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss as reinforcement asks for it: weighted, and with a scale of its own."""
    hidden = recipe.hidden(inputs)
    return weighted_loss(
        hidden,
        recipe.model.unembedding.weight,
        targets,
        recipe.model.config.vocab_size,
        torch.ones_like(targets, dtype=torch.float32),
        scale=1e-3,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_step_never_waits_for_the_device(compile: bool) -> None:
    torch.compiler.reset()
    recipe = build(build_runtime("cuda", "bfloat16"))
    hp = hyperparameters("cuda")
    recipe.compile = compile
    recipe.optimizer = Optimizer(
        recipe.model,
        build_groups(recipe.model, hp.learning_rates),
        torch.bfloat16,
        compile=compile,
    )

    def step() -> None:
        for loss in (recipe.loss, lambda *batch: loss_of(recipe, *batch)):
            loss(*recipe.next_micro_batch()).backward()  # type: ignore[no-untyped-call]
        recipe.optimizer.step(0.5, 0.9, 0.1)
        recipe.optimizer.zero_grad()

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def five_steps(device: str, dtype: torch.dtype, compile: bool) -> dict[str, Tensor]:
    """Return the parameters after five steps on drawn gradients, in float32."""
    hp = hyperparameters(device)
    model = Transformer(hp.model, dtype)
    model.init_weights(0)
    model.to(device)
    optimizer = Optimizer(model, build_groups(model, hp.learning_rates), dtype, compile)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.grad = draw.to(parameter.device, parameter.dtype)
        optimizer.step(0.1 * (step + 1), 0.9, 0.1)
    return {name: parameter.detach().float() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), DEVICES[1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_five_compiled_optimizer_steps_are_as_good_as_plain_ones(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled or not, bfloat16 rounds at other places: neither may be farther from float32."""
    torch.compiler.reset()
    if dtype == torch.float32:  # the small parameters too
        monkeypatch.setattr(optimizer_module, "WORTH_COMPILING", 0)
    with precision("highest"):
        exact = five_steps(device, torch.float32, compile=False)
        plain = exact if dtype == torch.float32 else five_steps(device, dtype, compile=False)
        fused = five_steps(device, dtype, compile=True)
    for name, expected in exact.items():
        allowed = 1e-4 * expected.norm() + 1.25 * (plain[name] - expected).norm()
        assert (fused[name] - expected).norm() <= allowed, name


@pytest.mark.gpu
def test_the_device_of_a_run_becomes_the_current_one() -> None:
    last = torch.cuda.device_count() - 1
    runtime = build_runtime(f"cuda:{last}")
    with precision("highest"):
        prepare_process(runtime)
    assert torch.cuda.current_device() == last
    torch.cuda.set_device(0)
    kept = torch.ones(2**20, device=runtime.device)
    runtime.reset_peak_memory()
    runtime.synchronize()
    assert kept.nbytes <= runtime.peak_memory_bytes() <= runtime.total_memory_bytes()
