"""Schedules by progress, and what fine-tuning takes over from its base model."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from archerchat.checkpoint import Checkpoint
from archerchat.data.conversation_loader import Counts, Used
from archerchat.dial import DialConfig, build_hyperparameters
from archerchat.distributed import Ranks
from archerchat.errors import UsageError
from archerchat.runtime import Runtime
from archerchat.training.base_model import inherit
from archerchat.training.sft import Finetuning
from archerchat.training.stage import Stage

CPU = Runtime(torch.device("cpu"), torch.float32, "a CPU", "forced")
DIAL = DialConfig(2, 16, 16, max_seq_len=64, num_iterations=4, total_batch_size=512)
HP = build_hyperparameters(DIAL, 360)


def base_model(meta: dict[str, Any]) -> Checkpoint:
    return Checkpoint(4, Path("base/step_000004"), {}, meta, {})


TRAINED = base_model(
    {
        "identity": {
            "learning_rates": asdict(HP.learning_rates),
            "total_batch_size": 512,
            "device_batch_size": 4,
        }
    }
)


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0, 1), (0.3, 1), (0.5, 1), (0.75, 0.5), (0.9, 0.2), (1, 0), (1.2, 0)],
)
def test_the_rate_falls_over_the_second_half(progress: float, expected: float) -> None:
    settings = recipe(progress, None).settings(0)
    assert settings.lr_multiplier == pytest.approx(expected)
    assert settings.muon_weight_decay == 0


@pytest.mark.parametrize(("step", "expected"), [(0, 0.85), (150, 0.9), (300, 0.95), (9999, 0.95)])
def test_the_momentum_rises_over_300_steps(step: int, expected: float) -> None:
    assert recipe(0.0, None).settings(step).muon_momentum == pytest.approx(expected)


def recipe(progress: float, num_iterations: int | None, num_epochs: int | None = 1) -> Finetuning:
    """A stage of nothing but a position in its data, whose pass takes about 70 steps."""
    made = object.__new__(Finetuning)
    stream = SimpleNamespace(used=Used(Counts(), int(1000 * progress), progress))
    made.loader = cast(Any, SimpleNamespace(own=[stream]))
    made.ranks, made.pass_tokens, made.total_batch_tokens = Ranks(), 70.0, 1
    made.config = cast(
        Any, SimpleNamespace(num_iterations=num_iterations, passes=num_epochs or math.inf)
    )
    return made


@pytest.mark.parametrize(
    ("step", "progress", "num_iterations", "expected"),
    [
        (0, 0.0, None, 70),  # a first estimate
        (10, 0.25, None, 40),  # as it has gone so far
        (10, 0.999, None, 11),  # there is data left: at least another step
        (10, 1.0, None, 10),  # there is none
        (0, 0.0, 30, 30),
        (10, 0.25, 30, 30),
        (10, 0.5, 30, 20),  # the data will end before
        (10, 0.25, 10, 10),  # the steps are done
        (10, 1.1, 30, 10),
    ],
)
def test_the_end_is_estimated_until_the_data_is_used_up(
    step: int, progress: float, num_iterations: int | None, expected: int
) -> None:
    assert recipe(progress, num_iterations).total_steps(step) == expected


@pytest.mark.parametrize(
    ("step", "progress", "num_iterations", "num_epochs", "steps", "share"),
    [
        (10, 1.5, None, 3, 20, 0.5),
        (10, 3.1, None, 3, 10, 3.1 / 3),
        (10, 2.0, 40, None, 40, 0.25),  # steps alone: as many passes as they take
        (40, 8.0, 40, None, 40, 1.0),
        (10, 1.0, 40, 2, 20, 0.5),  # whichever ends first
        (10, 1.0, 12, 2, 12, 10 / 12),
    ],
)
def test_passes_and_steps_end_a_run(
    step: int, progress: float, num_iterations: int, num_epochs: int, steps: int, share: float
) -> None:
    made = recipe(progress, num_iterations, num_epochs)
    assert made.total_steps(step) == steps
    assert made.progress_at(step) == pytest.approx(share)


def test_the_ranks_do_not_exchange_what_a_run_of_steps_alone_does_not_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = recipe(0.5, 40, None)
    monkeypatch.delattr(Ranks, "gather")
    assert made.progress_at(10) == 0.25


@pytest.mark.parametrize(
    ("step", "progress", "num_iterations", "expected"),
    [(0, 0.0, None, 0.0), (10, 0.25, None, 0.25), (10, 0.25, 20, 0.5), (10, 0.75, 20, 0.75)],
)
def test_progress_is_that_of_data_or_steps_whichever_ends_first(
    step: int, progress: float, num_iterations: int | None, expected: float
) -> None:
    made = recipe(progress, num_iterations)
    assert made.progress_at(step) == expected
    assert made.settings(step).lr_multiplier == min(1.0, 2 * (1 - expected))


def test_batch_and_rates_are_the_base_model_s() -> None:
    rows, tokens, found = inherit(TRAINED, HP.model, 0.8)
    assert (rows, tokens) == (4, 512)
    rates = asdict(HP.learning_rates)
    assert asdict(found) == {n: pytest.approx(r * 0.8) for n, r in rates.items()}


def test_another_batch_scales_the_rates_as_the_dial_does() -> None:
    _, _, found = inherit(TRAINED, HP.model, 1.0, 2048)
    bigger = build_hyperparameters(
        DialConfig(2, 16, 16, max_seq_len=64, num_iterations=4, total_batch_size=2048), 360
    )
    assert asdict(found) == {n: pytest.approx(r) for n, r in asdict(bigger.learning_rates).items()}


def test_an_imported_model_gets_the_dial_s_rates() -> None:
    rows, tokens, found = inherit(base_model({}), HP.model, 1.0, 512)
    assert asdict(found) == {n: pytest.approx(r) for n, r in asdict(HP.learning_rates).items()}
    assert tokens == 512
    assert 512 % (rows * 64) == 0


def choose(runtime: Runtime, forced: str | None, masks: bool, compile: bool = True) -> Any:
    config = SimpleNamespace(attention=forced)
    stage: Any = SimpleNamespace(
        runtime=runtime, config=config, compile=compile, model_config=HP.model
    )
    return Stage.choose_attention(stage, masks)


def test_attention_that_cannot_mask_documents_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Runtime(torch.device("cuda"), torch.bfloat16, "a GPU", "forced")
    monkeypatch.setattr("archerchat.model.attention.flash_module", lambda device, dtype: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # Triton is there
    assert choose(CPU, None, masks=True)[0] == "matmul"
    assert choose(cuda, "flex", masks=True)[0] == "flex"
    old = Runtime(torch.device("cuda"), torch.float32, "a T4", "forced")
    assert choose(old, None, masks=False)[0] == "flex"  # torch's kernel needs 16 bits
    monkeypatch.setattr("archerchat.training.stage.runs_varlen", lambda device, dtype: True)
    assert choose(cuda, None, masks=True, compile=False) == ("varlen", "not compiled")
    with pytest.raises(UsageError, match="'flahs' is not one of"):
        choose(CPU, "flahs", masks=False)


def test_flash_is_replaced_where_documents_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Runtime(torch.device("cuda"), torch.bfloat16, "a GPU", "forced")
    module = "archerchat.model.attention.flash_module"
    monkeypatch.setattr(module, lambda device, dtype: "flash_attn")
    assert choose(cuda, None, masks=False)[0] == "flash"
    assert choose(cuda, None, masks=True)[0] == "flex"
    with pytest.raises(UsageError, match="--attention flash cannot keep the conversations"):
        choose(cuda, "flash", masks=True)
