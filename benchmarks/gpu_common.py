"""What the parts of the check on a card share: sizes, rows that survive a crash, two ceilings.

Each part writes its figures row by row, so that a part that is cut off leaves what it measured.
Run as a script, this measures the ceilings: a large matrix product and a large copy.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from archerchat.dial import DialConfig, build_hyperparameters
from archerchat.model.config import ModelConfig
from archerchat.runtime import Runtime, build_runtime, prepare_process

DRY_RUN = os.environ.get("ARCHERCHAT_GPU_DRY_RUN") == "1"
"""Run on the CPU at toy sizes, uncompiled, to see that everything works."""
DEVICE = "cpu" if DRY_RUN else "cuda"
BUNDLE = Path(__file__).resolve().parents[1] / ".gpu-bundle"
VOCAB_SIZE = 512 if DRY_RUN else 32_768
LENGTH = 128 if DRY_RUN else 2048
PRODUCT = 256 if DRY_RUN else 8192
COPY_BYTES = 2**22 if DRY_RUN else 2**32
CRASHED = 3
"""Exit status after an error: what CUDA raised once, it raises again in the same process."""


class Rows:
    """A part's figures by row, kept in a file of JSON lines; the last line of a name counts."""

    def __init__(self, path: Path, until: float, only: str = "") -> None:
        self.path, self.until, self.only = path, until, only

    def read(self) -> dict[str, dict[str, Any]]:
        """Return each row's figures; a row that failed has an `error`."""
        if not self.path.exists():
            return {}
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return {line.pop("name"): line for line in lines}

    def measure(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Add a row unless it is there. An error ends the process; start it again for the rest."""
        if name in self.read() or not re.search(self.only, name):
            return
        if time.time() > self.until:
            self._add(name, {"error": "no time left"})
            return
        self._add(name, {"error": "the process died here"}, quietly=True)
        started = time.perf_counter()
        try:
            figures = work()
        except Exception as error:
            traceback.print_exc()
            self._add(name, {"error": f"{type(error).__name__}: {str(error)[:300]}"})
            sys.exit(CRASHED)
        self._add(name, {**figures, "seconds": round(time.perf_counter() - started, 1)})

    def _add(self, name: str, figures: dict[str, Any], quietly: bool = False) -> None:
        if not quietly:
            print(name, json.dumps(figures), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"name": name, **figures}) + "\n")


def open_rows() -> tuple[Rows, argparse.Namespace]:
    """Read a part's command line: where its rows go, and until when."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds since 1970")
    parser.add_argument("--only", default="", help="rows to measure: a regular expression")
    parser.add_argument("--anatomy", action="store_true")
    options = parser.parse_args()
    return Rows(options.rows, options.until, options.only), options


def start(dtype: str = "bfloat16") -> Runtime:
    """Prepare this process for the device."""
    runtime = build_runtime(DEVICE, dtype)
    prepare_process(runtime)
    return runtime


def model_config(depth: int, length: int = LENGTH, windows: str = "SSSL") -> ModelConfig:
    """Return the dial's model of a depth; in a dry run a narrow one of two layers."""
    size: dict[str, Any] = (
        {"depth": 2, "aspect_ratio": 32, "head_dim": 32} if DRY_RUN else {"depth": depth}
    )
    dial = DialConfig(**size, max_seq_len=length, window_pattern=windows, num_iterations=1000)
    return build_hyperparameters(dial, VOCAB_SIZE).model


def measure_product(runtime: Runtime) -> dict[str, Any]:
    """Time a square bfloat16 product of random matrices."""
    a, b = torch.randn(2, PRODUCT, PRODUCT, device=runtime.device, dtype=torch.bfloat16).unbind()
    out = torch.empty_like(a)
    seconds = runtime.median_seconds(lambda: torch.mm(a, b, out=out), 10)
    return {"size": PRODUCT, "tflops": 2 * PRODUCT**3 / seconds / 1e12}


def measure_copy(runtime: Runtime) -> dict[str, Any]:
    """Time a copy within the device; bytes read and bytes written both count."""
    source = torch.randn(COPY_BYTES // 4, device=runtime.device)
    target = torch.empty_like(source)
    seconds = runtime.median_seconds(lambda: target.copy_(source), 10)
    return {"bytes": COPY_BYTES, "gigabytes_per_second": 2 * COPY_BYTES / seconds / 1e9}


def ceilings(rows: Rows) -> tuple[float, float]:
    """Return the measured FLOP/s and bytes/s; NaN where they could not be measured."""
    found = Rows(rows.path.with_name("machine.jsonl"), 0).read()
    product = found.get("product", {}).get("tflops", float("nan"))
    copy = found.get("copy", {}).get("gigabytes_per_second", float("nan"))
    return product * 1e12, copy * 1e9


def main() -> None:
    rows, _ = open_rows()
    runtime = start()
    rows.measure("product", lambda: measure_product(runtime))
    rows.measure("copy", lambda: measure_copy(runtime))


if __name__ == "__main__":
    main()
