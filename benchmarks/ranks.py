"""Two ranks against one process on the CPU: speed, the same model, and the stall of a save.

    python benchmarks/ranks.py

The last line is one JSON object. Everything happens in a temporary home, with the text that every
Python installation carries. `kills.py` kills ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from archerchat.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint
from archerchat.home import Home

PORT = "29517"
ROWS, LENGTH, TOTAL, STEPS = 4, 256, 8192, 20
SETTINGS = (
    f"--depth 4 --aspect-ratio 64 --head-dim 64 --max-seq-len {LENGTH} --total-batch-size {TOTAL} "
    "--device cpu --dtype float32 --no-compile --eval-every none --sample-every none "
    "--data stdlib"
).split()


def command(ranks: int, words: list[str], restarts: int = 0) -> list[str]:
    """Return a command line; of several ranks by torchrun."""
    launcher = f"-m torch.distributed.run --nproc-per-node={ranks} --master-port={PORT}".split()
    launcher += [f"--max-restarts={restarts}", "--monitor-interval=0.2"]
    return [sys.executable, *(launcher if ranks > 1 else []), "-m", "archerchat.cli", *words]


def pretrain(ranks: int, tag: str, steps: int, *more: str, restarts: int = 0) -> list[str]:
    rows = ["--device-batch-size", str(ROWS)]
    words = ["pretrain", *SETTINGS, *rows, "--num-iterations", str(steps), "--model-tag", tag]
    return command(ranks, [*words, *more], restarts)


def run(home: Home, line: list[str], threads: int) -> str:
    """Run a command in the home; return what it printed."""
    environment = os.environ | {"ARCHERCHAT_HOME": str(home.root), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-3000:])
    return done.stdout


def weights(home: Home, tag: str, step: int | None = None) -> dict[str, Any]:
    return load_checkpoint(find_checkpoint(home.checkpoint_dir("base", tag), step)).state["model"]


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest relative distance; backout_lambda's gradient is rounding alone."""
    return max(
        float((one[name] - other[name]).norm() / other[name].norm().clamp(min=1e-3))
        for name in other
        if name != "backout_lambda"
    )


def measure_speed(home: Home) -> dict[str, float]:
    """Return tokens/s of one process on two threads, of two ranks on one each, and the ratio."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(2):
        for ranks in (1, 2):
            tag = f"speed-{ranks}-{turn}"
            run(home, pretrain(ranks, tag, STEPS), threads=2 // ranks)
            summary = json.loads((home.run_dir(tag) / "summary.json").read_text())
            rates[ranks].append(summary["tokens_per_second"])
    one, two = max(rates[1]), max(rates[2])
    return {"one_process": round(one), "two_ranks": round(two), "ratio": round(two / one, 3)}


def measure_difference(home: Home) -> float:
    """Begin on four ranks; return how far one, two and four are apart at the end."""
    begun = pretrain(4, "begun", STEPS, "--save-every", "1", "--keep-last", "99")
    run(home, begun, threads=1)
    expected, apart = weights(home, "begun"), 0.0
    directory = home.checkpoint_dir("base", "begun")
    for ranks in (1, 2, 4):
        for step in list_checkpoints(directory):
            if step > 1:
                subprocess.run(["rm", "-r", str(find_checkpoint(directory, step))], check=True)
        run(home, command(ranks, begun[begun.index("archerchat.cli") + 1 :]), threads=1)
        apart = max(apart, difference(weights(home, "begun"), expected))
    return apart


def measure_stall(home: Home) -> float:
    """Return how many steps' time the longest save takes from training."""
    printed = run(home, pretrain(1, "saves", STEPS, "--save-every", "5"), threads=2)
    stalls = [float(x) for x in re.findall(r"training waited ([\d.]+) s", printed)]
    summary = json.loads((home.run_dir("saves") / "summary.json").read_text())
    return max(stalls) / float(TOTAL / summary["tokens_per_second"])


def prepare_home(folder: Path) -> Home:
    """Return a home with data and a tokenizer made of the text that Python carries."""
    home = Home(folder)
    run(home, command(1, ["data", "build", "stdlib"]), threads=2)
    train = ["tokenizer", "train", "--data", "stdlib", "--vocab-size", "2048"]
    run(home, command(1, train), threads=2)
    return home


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="archerchat-ranks-") as folder:
        home = prepare_home(Path(folder))
        result: dict[str, Any] = measure_speed(home)
        result["save_stall_steps"] = round(measure_stall(home), 3)
        result["max_difference"] = measure_difference(home)
    print(json.dumps(result))
    held = (
        result["ratio"] >= 0.9,
        result["save_stall_steps"] <= 1,
        result["max_difference"] < 1e-4,
    )
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
