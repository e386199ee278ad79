"""Two ranks against one process on the CPU: speed, the same model, saving, and kills.

    python benchmarks/ranks.py              # speed, differences, the stall of a save
    python benchmarks/ranks.py --kills 100  # and one of two ranks killed again and again

The last line is one JSON object. Everything happens in a temporary home, with the text that every
Python installation carries.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from archerchat.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint
from archerchat.home import Home

PORT = "29517"
ROWS, LENGTH, TOTAL, STEPS, KILLED_STEPS = 4, 256, 8192, 20, 200
SETTINGS = (
    f"--depth 4 --aspect-ratio 64 --head-dim 64 --max-seq-len {LENGTH} --total-batch-size {TOTAL} "
    "--device cpu --dtype float32 --no-compile --eval-every none --sample-every none"
).split()


def command(ranks: int, words: list[str], restarts: int = 0) -> list[str]:
    """Return a command line; of several ranks by torchrun."""
    launcher = f"-m torch.distributed.run --nproc-per-node={ranks} --master-port={PORT}".split()
    launcher += [f"--max-restarts={restarts}", "--monitor-interval=0.2"]
    return [sys.executable, *(launcher if ranks > 1 else []), "-m", "archerchat.cli", *words]


def pretrain(home: Home, ranks: int, tag: str, steps: int, *more: str) -> list[str]:
    rows = ["--device-batch-size", str(ROWS)]
    words = ["pretrain", *SETTINGS, *rows, "--num-iterations", str(steps), "--model-tag", tag]
    return command(ranks, [*words, *more])


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
            run(home, pretrain(home, ranks, tag, STEPS), threads=2 // ranks)
            summary = json.loads((home.run_dir(tag) / "summary.json").read_text())
            rates[ranks].append(summary["tokens_per_second"])
    one, two = max(rates[1]), max(rates[2])
    return {"one_process": round(one), "two_ranks": round(two), "ratio": round(two / one, 3)}


def measure_difference(home: Home) -> float:
    """Begin on four ranks; return how far one, two and four are apart at the end."""
    begun = pretrain(home, 4, "begun", STEPS, "--save-every", "1", "--keep-last", "99")
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
    printed = run(home, pretrain(home, 1, "saves", STEPS, "--save-every", "5"), threads=2)
    stalls = [float(x) for x in re.findall(r"training waited ([\d.]+) s", printed)]
    summary = json.loads((home.run_dir("saves") / "summary.json").read_text())
    return max(stalls) / float(TOTAL / summary["tokens_per_second"])


def measure_kills(home: Home, kills: int) -> dict[str, Any]:
    """Kill a rank of two again and again; compare with an undisturbed run.

    Half of the kills come soon after a start, half soon after a checkpoint.
    """
    small = ["--depth", "2", "--total-batch-size", "2048", "--save-every", "2", "--keep-last", "2"]
    run(home, pretrain(home, 2, "quiet", KILLED_STEPS, *small), threads=1)
    line = pretrain(home, 2, "killed", KILLED_STEPS, *small)
    line = command(2, line[line.index("archerchat.cli") + 1 :], restarts=20 * kills)
    environment = os.environ | {"ARCHERCHAT_HOME": str(home.root), "OMP_NUM_THREADS": "1"}
    done, chooser, directory = 0, random.Random(0), home.checkpoint_dir("base", "killed")
    with (home.root / "killed.log").open("w") as log:
        process = subprocess.Popen(line, env=environment, stdout=log, stderr=log)
        while process.poll() is None and done < kills:
            saved = list_checkpoints(directory)
            if chooser.random() < 0.5:
                time.sleep(chooser.uniform(0.2, 5))
            else:
                while process.poll() is None and list_checkpoints(directory) == saved:
                    time.sleep(0.02)
                time.sleep(chooser.uniform(0, 1))
            children = f"/proc/{process.pid}/task/{process.pid}/children"
            pids = Path(children).read_text().split() if process.poll() is None else []
            if len(pids) == 2 and (list_checkpoints(directory) or [0])[-1] < KILLED_STEPS - 10:
                os.kill(int(chooser.choice(pids)), signal.SIGKILL)
                done += 1
        process.wait()
    ended, expected = weights(home, "killed"), weights(home, "quiet")
    equal = all(bool((ended[name] == expected[name]).all()) for name in expected)
    return {"kills": done, "equal": equal, "exit_code": process.returncode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--kills", type=int, default=0, help="kills of a rank, in a run of 200 steps"
    )
    parser.add_argument("--only-kills", action="store_true", help="leave out speed and differences")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="archerchat-ranks-") as folder:
        home = Home(Path(folder))
        run(home, command(1, ["data", "build", "stdlib"]), threads=2)
        train = ["tokenizer", "train", "--data", "stdlib", "--vocab-size", "2048"]
        run(home, command(1, train), threads=2)
        SETTINGS.extend(["--data", "stdlib"])
        result: dict[str, Any] = {}
        if not given.only_kills:
            result = measure_speed(home)
            result["save_stall_steps"] = round(measure_stall(home), 3)
            result["max_difference"] = measure_difference(home)
        if given.kills:
            result |= measure_kills(home, given.kills)
    print(json.dumps(result))
    held = (
        result.get("ratio", 1) >= 0.9,
        result.get("save_stall_steps", 0) <= 1,
        result.get("max_difference", 0) < 1e-4,
        result.get("kills", given.kills) == given.kills,
        result.get("equal", True),
    )
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
