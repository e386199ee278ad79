"""Kill a run with SIGKILL at random moments, and check that nothing is lost.

    python benchmarks/kills.py                         # 100 kills of each kind
    python benchmarks/kills.py checkpoints --kills 12  # only a process that saves, as the tests do

`checkpoints`: a process saves one checkpoint after another. After each kill every checkpoint that
is listed must load, and the latest must be newer than before. `ranks`: one of the two ranks of a
training run of 200 steps is killed, and torchrun starts both again. In the end the weights must
equal those of a run that nobody disturbed, bit for bit. The last line is one JSON object, and the
exit code is 1 when anything was lost. Endlex's kills are in `endlex_faults.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import ranks
from archerchat.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from archerchat.home import Home

STEPS = 200
RANKS = 2
SMALL = ["--depth", "2", "--total-batch-size", "2048", "--save-every", "2", "--keep-last", "2"]
KEPT = 2


def save_forever(directory: Path, step: int) -> None:
    """Save one checkpoint after another, the first one a step after `step`."""
    while True:
        step += 1
        tensors = {"w": torch.full((50_000,), float(step))}
        save_checkpoint(directory, step, {"model": tensors, "rng": tensors}, {}, keep_last=KEPT)


def kill_savers(directory: Path, kills: int, chooser: random.Random) -> dict[str, Any]:
    """Kill a process that saves; return how many kills there were and how many lost something."""
    torch.set_num_threads(1)  # the pool of threads does not survive a fork
    context = multiprocessing.get_context("fork")
    save_checkpoint(directory, 0, {"model": {"w": torch.zeros(50_000)}}, {})
    last, lost = 0, 0
    for _ in range(kills):
        saver = context.Process(target=save_forever, args=(directory, last), daemon=True)
        saver.start()
        while list_checkpoints(directory)[-1] == last and saver.is_alive():
            time.sleep(0.001)
        time.sleep(chooser.uniform(0, 0.05))
        saver.kill()
        saver.join()
        loaded = [
            load_checkpoint(find_checkpoint(directory, s)) for s in list_checkpoints(directory)
        ]
        whole = all(bool((c.state["model"]["w"] == c.step).all()) for c in loaded)
        resumed = load_checkpoint(find_checkpoint(directory))  # what a run resumes from
        lost += not (whole and resumed.step == loaded[-1].step > last)
        last = loaded[-1].step
    # Each kill between a rename and the pruning left one more than is kept: none may stay.
    save_checkpoint(directory, last + 1, {"model": {"w": torch.zeros(1)}}, {}, keep_last=1)
    lost += [path.name for path in directory.iterdir()] != [f"step_{last + 1:06d}"]
    return {"kills": kills, "lost": int(lost)}


def kill_ranks(home: Home, kills: int, chooser: random.Random) -> dict[str, Any]:
    """Kill a rank of two again and again; compare with an undisturbed run.

    Half of the kills come soon after a start, half soon after a checkpoint.
    """
    ranks.run(home, ranks.pretrain(RANKS, "quiet", STEPS, *SMALL), threads=1)
    line = ranks.pretrain(RANKS, "killed", STEPS, *SMALL, restarts=20 * kills)
    environment = os.environ | {"ARCHERCHAT_HOME": str(home.root), "OMP_NUM_THREADS": "1"}
    done, directory = 0, home.checkpoint_dir("base", "killed")
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
            if len(pids) == RANKS and (list_checkpoints(directory) or [0])[-1] < STEPS - 10:
                os.kill(int(chooser.choice(pids)), signal.SIGKILL)
                done += 1
        process.wait()
    ended, expected = ranks.weights(home, "killed"), ranks.weights(home, "quiet")
    same = all(bool((ended[name] == expected[name]).all()) for name in expected)
    return {"kills": done, "lost": int(not same or process.returncode != 0)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="checkpoints, ranks (both)")
    parser.add_argument("--kills", type=int, default=100, help="kills of each kind (100)")
    given = parser.parse_args()
    kinds = given.kinds or ["checkpoints", "ranks"]
    if unknown := set(kinds) - {"checkpoints", "ranks"}:
        parser.error(f"unknown kind {unknown.pop()!r}: choose checkpoints or ranks")
    chooser, result = random.Random(0), {}
    with tempfile.TemporaryDirectory(prefix="archerchat-kills-") as folder:
        if "checkpoints" in kinds:
            saves = Path(folder) / "checkpoints"
            result["checkpoints"] = kill_savers(saves, given.kills, chooser)
        if "ranks" in kinds:
            home = ranks.prepare_home(Path(folder) / "home")
            result["ranks"] = kill_ranks(home, given.kills, chooser)
    print(json.dumps(result))
    sys.exit(int(any(kind["lost"] or kind["kills"] < given.kills for kind in result.values())))


if __name__ == "__main__":
    main()
