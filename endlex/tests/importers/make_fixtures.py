"""Make the files that the importers are tested on, with the real libraries.

Run in an environment of its own; the results are committed, so that the tests need neither:

    pip install wandb tensorboard torch
    python endlex/tests/importers/make_fixtures.py
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory

FIXTURES = Path(__file__).parent / "fixtures"


def make_wandb() -> None:
    with TemporaryDirectory() as scratch:
        os.environ.update(WANDB_MODE="offline", WANDB_DIR=scratch, WANDB_SILENT="true")
        os.environ.update(WANDB_DATA_DIR="/var/tmp/wandb-data")  # its path gets into the file
        import wandb

        settings = wandb.Settings(
            disable_git=True,
            save_code=False,
            console="off",
            host="box",
            x_disable_meta=True,
            x_stats_sampling_interval=0.2,
        )
        run = wandb.init(
            project="import-test",
            name="d12",
            id="abcdefgh",
            config={"depth": 12, "optim": {"lr": 0.02}},
            tags=["a", "b"],
            group="g",
            notes="a note",
            settings=settings,
        )
        for step in range(10):
            run.log({"train/loss": 3.0 / (step + 1), "nested": {"a": step, "b": -step}})
        run.log({"train/loss": float("nan"), "inf": float("inf"), "flag": True})
        run.log({"sample": "Once upon <b>a time</b>", "hist": wandb.Histogram([1, 2, 3])})
        run.log({"table": wandb.Table(columns=["q", "a"], data=[["1+1", 2], ["x", None]])})
        run.config.update({"late": "yes"})
        run.log({"val/bpb": 1.5, "long": "x" * 15_000}, step=100)  # fills the first block
        time.sleep(1)  # a few samples of system statistics
        run.finish()
        target = FIXTURES / "wandb"
        shutil.rmtree(target, ignore_errors=True)
        source = next(Path(scratch).rglob("*.wandb")).parent
        for path in (*source.glob("*.wandb"), *source.rglob("*.table.json")):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


def make_tensorboard() -> None:
    import numpy as np
    from tensorboard.summary import Writer
    from torch.utils.tensorboard import SummaryWriter

    target = FIXTURES / "tensorboard"
    shutil.rmtree(target, ignore_errors=True)
    writer = SummaryWriter(str(target / "torch"))
    for step in range(10):
        writer.add_scalar("train/loss", 3.0 / (step + 1), step)
        writer.add_scalar("lr", 0.25 * step, step, new_style=True)
    writer.add_scalar("train/loss", float("nan"), 10)
    writer.add_scalar("double", 1 / 3, 10, new_style=True, double_precision=True)
    writer.add_text("sample", "Once upon <b>a</b> time", 3)
    writer.add_histogram("weights", np.arange(10.0), 1)
    writer.add_hparams({"lr": 0.1, "opt": "adam"}, {"hp/metric": 1.0}, run_name="hp")
    writer.close()
    second = Writer(str(target / "tensors"))
    for step in range(5):
        second.add_scalar("x", step / 2, step)
    second.close()
    for path in list(target.rglob("*tfevents*")):  # the host's name and the time are in the name
        path.rename(path.with_name("events.out.tfevents.1.box.1"))


if __name__ == "__main__":
    make_wandb()
    make_tensorboard()
