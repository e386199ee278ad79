"""A trainer for the fault tests: logs ten metrics a step until it is told to stop, or is killed.

    python faulty_trainer.py DIR --progress FILE [--steps N] [--pace SECONDS] [--jump-clock]
                             [--save FILE --name NAME] [--save-every N]

Started again with the same directory it goes on with the step after the last in the journal. After
each `log` the step is written to FILE: what FILE names must be in the journal, whatever happened.
A file DIR/stop ends it in an orderly way.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path

import endlex
from endlex.reading import read_run

NAMES = tuple(f"train/metric_{i}" for i in range(10))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--progress", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--pace", type=float, default=0.001)
    parser.add_argument("--jump-clock", action="store_true")
    parser.add_argument("--save", type=Path, help="a file to save as a checkpoint, first of all")
    parser.add_argument("--name", help="the checkpoint's")
    parser.add_argument("--save-every", type=int, default=0, help="steps between checkpoints")
    options = parser.parse_args()
    first = 1 + last_step(options.directory)
    if options.jump_clock:
        jump_clock()
    run = endlex.init("faults", "trainer", config={"first": first}, directory=options.directory)
    if options.save:
        run.save(options.save, step=first, name=options.name, link=True)
    progress = os.open(options.progress, os.O_RDWR | os.O_CREAT, 0o644)
    for step in range(first, options.steps):
        run.log({name: step + i / 16 for i, name in enumerate(NAMES)}, step=step)
        os.pwrite(progress, b"%020d" % step, 0)
        if options.save_every and step % options.save_every == 0:
            save_new_file(run, step)
        if (options.directory / "stop").exists():
            break
        time.sleep(options.pace)
    run.finish()


def last_step(directory: Path) -> int:
    """The largest step in the journals here, -1 where there is none."""
    if not (directory / "journal").is_dir():
        return -1
    records = read_run(directory)
    return max((r["step"] for r in records if r["type"] == "metrics"), default=-1)


def save_new_file(run: endlex.Run, step: int) -> None:
    """Save a file that is deleted at once, as trainers do that keep only the last."""
    assert run.directory is not None
    path = run.directory.with_name(f"step-{step}.bin")
    path.write_bytes(os.urandom(300_000))
    run.save(path, step=step)
    path.unlink()


def jump_clock() -> None:
    """Let this process's clock jump by up to an hour, in both directions, at every call."""
    real, chance = time.time, random.Random(0)
    time.time = lambda: real() + chance.uniform(-3600, 3600)


if __name__ == "__main__":
    main()
