"""Several ranks train one model: as one process would, elastically, and they end together."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from archerchat.checkpoint import Checkpoint, find_checkpoint, list_checkpoints, load_checkpoint

pytestmark = pytest.mark.slow
STEPS = 20
PORT = 29_600 + os.getpid() % 300
CHANGES: dict[str, Any] = {"device_batch_size": 2, "num_iterations": STEPS, "eval_every": 10}


Run = Callable[..., subprocess.CompletedProcess[str]]


def torchrun(home: Any, words: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start a command on two ranks as users do."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={PORT}"]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "archerchat.cli", *words],
        env=os.environ | {"ARCHERCHAT_HOME": str(home.root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def last(home: Any, stage: str = "base") -> Checkpoint:
    return load_checkpoint(find_checkpoint(home.checkpoint_dir(stage, "tiny")))


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest relative distance of two models' parameters.

    The gradient of backout_lambda is what is left of large sums that cancel: Adam divides its
    rounding by itself, and it wanders whatever is computed (docs/LOG.md, 2026-11-21).
    """
    return max(
        ((one[name] - other[name]).norm() / other[name].norm().clamp(min=1e-3)).item()
        for name in other
        if name != "backout_lambda"
    )


def test_ranks_train_the_model_of_one_process(
    tiny_home: Any, tmp_path: Path, run_ranks: Run
) -> None:
    """Four begin; one, two and four go on from their second step to the twentieth."""
    words = tiny_home.pretrain_words(**CHANGES, keep_last=99, packing="concat")
    done = run_ranks(tiny_home, 4, words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("attention ") == 1, "one rank prints"
    whole = last(tiny_home)
    assert whole.step == STEPS
    losses = {}
    for ranks in (1, 2, 4):
        home = tiny_home.copy(tmp_path / str(ranks))
        directory = home.checkpoint_dir("base", "tiny")
        for step in list_checkpoints(directory):
            if step > 2:
                shutil.rmtree(find_checkpoint(directory, step))
        done = run_ranks(home, ranks, words)
        assert done.returncode == 0, done.stderr
        ended = last(home)
        assert ended.step == STEPS
        if ranks == 4:
            assert all(map(torch.equal, *(x.state["model"].values() for x in (ended, whole))))
        assert apart(ended.state["model"], whole.state["model"]) < 1e-4
        losses[ranks] = ended.state["loop"]["smooth_loss"], ended.state["loop"]["last_val"]
    assert losses[1] == pytest.approx(losses[4], abs=1e-4)
    assert losses[2] == pytest.approx(losses[4], abs=1e-4)


def test_fine_tuning_and_reinforcement_are_those_of_one_process(
    tiny_home: Any, tmp_path: Path, run_ranks: Run
) -> None:
    """Four begin; one, two and four go on from their second step to the twentieth."""
    assert tiny_home.pretrain(device_batch_size=2, num_iterations=2) == 0
    shared = ["--device", "cpu", "--dtype", "float32", "--no-compile", "--model-tag", "tiny"]
    shared += ["--save-every", "1", "--keep-last", "99", "--num-iterations", str(STEPS)]
    shared += ["--eval-every", "none"]
    sft = ["sft", "--mixture", "Arithmetic:400", "--eval-tokens", "512"]
    rl = ["rl", "--task", "Arithmetic", "--examples-per-step", "4", "--num-samples", "2"]
    rl += ["--max-new-tokens", "4", "--eval-examples", "4", "--eval-samples", "2"]
    for stage, words in (("sft", sft), ("rl", rl)):
        done = run_ranks(tiny_home, 4, [*words, *shared])
        assert done.returncode == 0, done.stderr
        whole = last(tiny_home, stage)
        assert whole.step == STEPS
        for ranks in (1, 2, 4) if stage == "sft" else (1, 2):
            home = tiny_home.copy(tmp_path / f"{stage}-{ranks}")
            directory = home.checkpoint_dir(stage, "tiny")
            for step in list_checkpoints(directory):
                if step > 2:
                    shutil.rmtree(find_checkpoint(directory, step))
            done = run_ranks(home, ranks, [*words, *shared])
            assert done.returncode == 0, done.stderr
            ended = last(home, stage)
            assert ended.step == STEPS
            assert apart(ended.state["model"], whole.state["model"]) < 1e-4
            if ranks == 4:
                assert all(map(torch.equal, *(x.state["model"].values() for x in (ended, whole))))


def test_a_rank_that_dies_ends_the_job_and_a_restart_goes_on(
    tiny_home: Any, run_ranks: Run
) -> None:
    words = tiny_home.pretrain_words(**CHANGES | {"num_iterations": 2000}, packing="concat")
    process = torchrun(tiny_home, words)
    deadline = time.monotonic() + 120
    while not list_checkpoints(tiny_home.checkpoint_dir("base", "tiny")):
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    died = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - died < 45
    assert process.returncode != 0
    assert "rank      : 1 (local_rank: 1)" in output
    steps = list_checkpoints(tiny_home.checkpoint_dir("base", "tiny"))
    again = run_ranks(tiny_home, 2, [*words, "--extend", "--num-iterations", str(steps[-1] + 2)])
    assert again.returncode == 0, again.stderr
    assert last(tiny_home).step == steps[-1] + 2


def test_ctrl_c_saves_once_and_ends_all(tiny_home: Any) -> None:
    words = tiny_home.pretrain_words(**CHANGES | {"num_iterations": 5000, "save_every": 4000})
    process = torchrun(tiny_home, words, start_new_session=True)
    assert process.stdout is not None
    seen = ""
    while "step 1/" not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=90)
    assert "checkpoint saved" in output
    assert len(list_checkpoints(tiny_home.checkpoint_dir("base", "tiny"))) == 1


def test_what_ranks_cannot_do_is_said_once(tiny_home: Any, run_ranks: Run) -> None:
    done = run_ranks(tiny_home, 2, tiny_home.pretrain_words(device_batch_size=8))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "1024" in done.stderr


@pytest.mark.parametrize(
    ("words", "file", "message"),
    [
        (["--seed", "7"], "shard_00000.parquet", "identity.seed: 42 saved, 7 now"),
        ([], "shard_00009.parquet", "data.shard_0000"),
    ],
)
def test_ranks_that_would_train_other_runs_are_refused(
    tiny_home: Any, tmp_path: Path, run_ranks: Run, words: list[str], file: str, message: str
) -> None:
    """The second rank, as if on another machine, is given something else."""
    other = tiny_home.copy(tmp_path / "other")
    data = other.data_dir("tiny")
    (data / "shard_00000.parquet").rename(data / file)
    own = {1: (words, {"ARCHERCHAT_HOME": str(other.root)})}
    done = run_ranks(tiny_home, 2, tiny_home.pretrain_words(**CHANGES), own)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "rank 1 would train a different run than rank 0" in done.stderr
    assert message in done.stderr
    assert not list_checkpoints(tiny_home.checkpoint_dir("base", "tiny"))
