"""The reference's training runs, done again: its curves, its figures, and our speed on them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, SupportsFloat

from rich.console import Console
from rich.table import Table

from archerchat.console import ProgressLine
from archerchat.dial import DialConfig
from archerchat.exchange.nanochat import to_archerchat_names
from archerchat.home import Home
from archerchat.planning.peak_flops import peak_flops
from archerchat.training.loop import Loop
from archerchat.training.pretrain import PretrainConfig, Pretraining
from archerchat.training.resume import CheckpointWriter
from archerchat.training.telemetry import MetricsLog
from models import load_golden_tokenizer, load_golden_weights

RESTART_BOUND = 2e-5
VALIDATION_BOUND = 0.03
SPEED_BOUND = 21_500
"""Tokens/s of `d4_dim256_default` on two idle cores; reported, not judged: CPUs differ."""
REFERENCE_RUNS = {"float32": "d4_dim128_fp32", "bfloat16": "d4_dim128_b16"}


@dataclass(frozen=True)
class Recorder(MetricsLog):
    """Keep in memory what a run would write to its journal."""

    records: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def log(self, values: Mapping[str, SupportsFloat], step: int) -> None:
        self.records.append((step, {name: float(value) for name, value in values.items()}))

    def series(self, name: str) -> dict[int, float]:
        return {step: values[name] for step, values in self.records if name in values}


class NoCheckpoints(CheckpointWriter):
    """Save nothing: only the curves count."""

    def save(self, step: int, state: Mapping[str, Mapping[str, Any]], finished: bool) -> None:
        pass


@dataclass(frozen=True)
class GoldenRun:
    """One run on the golden corpus."""

    golden: str
    """Name in train_curve.json, whose arguments are taken."""
    dtype: str | None
    compile: bool
    weights: str | None = None
    """File of initial weights; drawn afresh without it."""
    attention: str | None = None
    num_iterations: int | None = None
    """Stop the schedule's run early, for timing."""
    validate: bool = True
    device_batch_size: int | None = None
    """Rows at a time; the golden's without it. The step's tokens are the golden's either way."""


RUNS = {
    "restart_float32": GoldenRun(
        "d4_dim128_restart", "float32", compile=False, weights="train_final.safetensors"
    ),
    "d4_dim128_float32": GoldenRun(
        "d4_dim128_fp32", "float32", compile=False, weights="train_init.safetensors",
        attention="sdpa",
    ),
    "d4_dim128_float32_compiled": GoldenRun(
        "d4_dim128_fp32", "float32", compile=True, weights="train_init.safetensors"
    ),
    "d4_dim128_bfloat16": GoldenRun(
        "d4_dim128_b16", "bfloat16", compile=True, weights="train_init.safetensors"
    ),
    "d4_dim256_plain_float32": GoldenRun(
        "d4_dim256_fp32", "float32", compile=True, attention="sdpa", num_iterations=30,
        validate=False,
    ),
    "d4_dim256_default": GoldenRun(
        "d4_dim256_fp32", None, compile=True, device_batch_size=32
    ),
}  # fmt: skip


def load_curves(oracle: Path) -> dict[str, Any]:
    """Return what the reference recorded of each of its runs."""
    curves: dict[str, Any] = json.loads((oracle / "train_curve.json").read_text())["runs"]
    return curves


def run_golden(name: str, oracle: Path) -> dict[str, Any]:
    """Train one golden configuration and return its curves and speed."""
    run = RUNS[name]
    tokenizer = load_golden_tokenizer(oracle)
    config = build_config(run, load_curves(oracle)[run.golden]["args"], oracle)
    recorder = Recorder()
    with tempfile.TemporaryDirectory(prefix="archerchat-benchmark-") as directory:
        home = Home(Path(directory))
        tokenizer.save(home.tokenizer_dir(config.tokenizer))
        recipe = Pretraining(config, home)
        recipe.build(None)
        runtime = recipe.runtime
        recipe.sample = lambda: {}  # type: ignore[method-assign]
        # The reference measures the initial weights too.
        recipe.evaluations = [replace(each, at_start=True) for each in recipe.evaluations]
        if run.weights:
            recipe.model.load_state_dict(load_golden_weights(oracle / run.weights))
        peak = peak_flops(runtime, home.cache_dir)
        loop = Loop(recipe, peak.flops_per_second)
        steps = recipe.total_steps(0)
        with closing(recipe.loader), ProgressLine(Console(stderr=True), steps) as progress:
            loop.run(NoCheckpoints(home.root, {}, 1), recorder, progress)
    return {
        "losses": list(recorder.series("train/last_micro_batch_loss").values()),
        "val_bpb": {str(step): bits for step, bits in recorder.series("val/bpb").items()},
        "norms": {name: p.double().norm().item() for name, p in recipe.model.named_parameters()},
        "tokens_per_second": loop.speed.tokens_per_second,
        "mfu": loop.speed.mfu,
        "peak_flops": peak.flops_per_second,
        "peak_memory_bytes": runtime.peak_memory_bytes(),
        "data_wait_share": loop.speed.data_wait_share,
    }


def build_config(run: GoldenRun, args: Mapping[str, Any], oracle: Path) -> PretrainConfig:
    """Take over the reference's arguments, except where the run has its own."""
    dial = DialConfig(
        depth=args["depth"],
        aspect_ratio=args["aspect_ratio"],
        head_dim=args["head_dim"],
        max_seq_len=args["max_seq_len"],
        num_iterations=run.num_iterations or args["num_iterations"],
        total_batch_size=args["total_batch_size"],
    )
    return PretrainConfig(
        dial=dial,
        data=str(oracle / "corpus"),
        packing="best-fit",
        device_batch_size=run.device_batch_size or args["device_batch_size"],
        eval_every=args["eval_every"] if run.validate else None,
        eval_tokens=args["eval_tokens"],
        compile=run.compile,
        dtype=run.dtype,  # type: ignore[arg-type]
        attention=run.attention,  # type: ignore[arg-type]
    )


def compare(
    results: Mapping[str, dict[str, Any]], curves: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """Return the figures of all runs, and whether they are within the goldens' tolerances."""
    restart = restart_differences(results["restart_float32"], curves["d4_dim128_restart"])
    finals = {
        dtype: (last_bits(results[f"d4_dim128_{dtype}"]), curves[run]["val"][-1]["val_bpb"])
        for dtype, run in REFERENCE_RUNS.items()
    }
    ours, theirs = max(finals.values(), key=lambda pair: abs(pair[0] - pair[1]))
    best, plain = results["d4_dim256_default"], results["d4_dim256_plain_float32"]
    passed = (
        restart["max_restart_difference"] <= RESTART_BOUND
        and restart["max_restart_bpb_difference"] <= 1e-5
        and restart["max_restart_norm_difference"] <= 1e-4
        and abs(ours - theirs) <= VALIDATION_BOUND
    )
    return {
        "tokens_per_second": best["tokens_per_second"],
        "mfu": best["mfu"],
        "measured_peak_tflops": best["peak_flops"] / 1e12,
        "peak_memory_bytes": best["peak_memory_bytes"],
        "val_bpb": ours,
        "val_bpb_reference": theirs,
        "val_bpb_by_dtype": finals,
        "val_bpb_float32_compiled": last_bits(results["d4_dim128_float32_compiled"]),
        **restart,
        "ratio_to_plain_float32": best["tokens_per_second"] / plain["tokens_per_second"],
        "speed_bound_met": best["tokens_per_second"] >= SPEED_BOUND,
        "data_wait_share": best["data_wait_share"],
    }, passed


def restart_differences(ours: Mapping[str, Any], golden: Mapping[str, Any]) -> dict[str, float]:
    """Return how far the restart's losses, validation and final weights are off."""
    losses = zip(ours["losses"], golden["loss"], strict=True)
    bits = {str(point["step"]): point["val_bpb"] for point in golden["val"]}
    norms = to_archerchat_names(golden["param_l2_after_n_steps"]["30"])
    return {
        "max_restart_difference": max(abs(a - b) for a, b in losses),
        "max_restart_bpb_difference": max(abs(ours["val_bpb"][step] - bits[step]) for step in bits),
        "max_restart_norm_difference": max(
            abs(ours["norms"][name] - norm) / norm for name, norm in norms.items()
        ),
    }


def last_bits(result: Mapping[str, Any]) -> float:
    """Return a run's final bits per byte."""
    return float(list(result["val_bpb"].values())[-1])


def print_table(results: Mapping[str, dict[str, Any]], curves: Mapping[str, Any]) -> None:
    table = Table("configuration", "tok/s", "MFU %", "val bpb", "reference", "memory MiB")
    for name, result in results.items():
        reference = curves[RUNS[name].golden]["val"]
        validated = bool(result["val_bpb"])
        table.add_row(
            name,
            f"{result['tokens_per_second']:,.0f}",
            f"{100 * result['mfu']:.1f}",
            f"{last_bits(result):.4f}" if validated else "",
            f"{reference[-1]['val_bpb']:.4f}" if reference and validated else "",
            f"{result['peak_memory_bytes'] / 2**20:,.0f}",
        )
    Console().print(table)
