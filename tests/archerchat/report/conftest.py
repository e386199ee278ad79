"""Runs as journals tell them, without training anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

import endlex
from archerchat.home import Home
from endlex.protocol import Status

MODEL = {
    "sequence_length": 64,
    "vocab_size": 360,
    "num_layers": 8,
    "num_heads": 2,
    "num_kv_heads": 2,
    "model_dim": 32,
    "window_pattern": "SSSL",
}


def session_config(**changes: Any) -> dict[str, Any]:
    """Return what a session says of its run."""
    config = {
        "stage": "base",
        "model_config": MODEL,
        "identity": {"total_batch_size": 512, "dtype": "float32"},
        "config": {"model_tag": None, "data": "tiny"},
        "hardware": {"device": "NVIDIA GeForce RTX 5060 Ti"},
        "environment": {"git_commit": "c0ffee", "command": "archerchat pretrain --depth 8"},
    }
    return config | changes


def write_session(
    home: Home,
    tag: str,
    steps: Iterable[int],
    *,
    config: Mapping[str, Any] | None = None,
    last_bits: float = 1.0,
    flops: float = 1e6,
    status: Status = "finished",
    text: str = "of France is",
) -> None:
    """Write a session that trained these steps, and measured and sampled at its end."""
    run = endlex.init(
        "archerchat", tag, config or session_config(), directory=home.run_dir(tag), mode="offline"
    )
    step = 0
    for step in steps:
        run.log(
            {
                "train/loss": 3.0 - 0.1 * step,
                "train/smooth_loss": 3.0 - 0.1 * step,
                "train/lr_multiplier": 1.0,
                "train/tokens_per_second": 256.0,
                "train/mfu": 0.4,
                "train/tokens": 512 * (step + 1),
                "train/flops": flops * (step + 1),
                "train/seconds": 2.0 * (step + 1),
                "train/memory_bytes": 2**30,
            },
            step=step,
        )
    run.log({"val/bpb": last_bits, "eval/seconds": 3.0}, step=step + 1)
    run.log_text("sample/The capital", text, step=step + 1)
    run.finish(status)


@pytest.fixture
def config() -> Callable[..., dict[str, Any]]:
    return session_config


@pytest.fixture
def session() -> Callable[..., None]:
    return write_session


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))
