"""A run that is killed or interrupted at any moment goes on exactly where it was."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from archerchat.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint
from archerchat.runtime import SAME_REQUEST_SECONDS

Launch = Callable[[list[str]], Any]

FORTY_STEPS = {"num_iterations": 40, "save_every": 20, "eval_every": 20, "sample_every": 20}


def wait_for_step(home: Any, step: int, child: Any) -> None:
    """Wait until model "killed" has a checkpoint of that step or a later one."""
    child.wait_for(lambda: any(saved >= step for saved in home.steps("killed")))


def wait_for_line(child: Any, start: str) -> None:
    """Wait until the child prints a line that starts so."""
    child.wait_for(lambda: f"\n{start}" in child.output())


PRETRAIN = {"num-iterations": 40, "save-every": 20, "eval-every": 20, "sample-every": 20}
SFT = {"model-tag": "tiny", "device": "cpu", "dtype": "float32", "eval-tokens": 2048}
SFT |= {"eval-every": 20, "save-every": 4}
RL = {"task": "SpellingBee", "source": "base", "model-tag": "tiny", "device": "cpu"}
RL |= {"examples-per-step": 2, "num-samples": 4, "max-new-tokens": 8, "num-iterations": 24}
RL |= {"eval-every": 8, "eval-examples": 3, "eval-samples": 2, "save-every": 4, "dtype": "float32"}
RUNS = {
    "pretrain": ("base", "pretrain", PRETRAIN | {"dtype": "float32"}),
    "concat": ("base", "pretrain", PRETRAIN | {"dtype": "bfloat16", "packing": "concat"}),
    "sft": ("sft", "sft", SFT | {"mixture": "SimpleSpelling:120,Arithmetic:40"}),
    "sft of repeated conversations": (
        "sft",
        "sft",
        SFT | {"mixture": "identity:60*2,SpellingBee:20"},
    ),
    "rl": ("rl", "rl", RL),
}
"""By name: the stage whose models a run makes, its command, and what is not as in `TINY_MODEL`."""
MORE = ("concat", "sft of repeated conversations")
PAID = """
from archerchat.tasks.generated import SpellingBeeTask
SpellingBeeTask.reward = lambda task, asked, said: sum(map(said.count, "aeiou")) / 4
"""
"""Pay for vowels: a model that says nothing right yet has something to learn."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in MORE else name for name in RUNS],
)
def test_a_killed_run_resumes_bit_for_bit(
    trained_home: Any,
    launch: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    assert_same_run: Callable[..., None],
) -> None:
    monkeypatch.setenv("ARCHERCHAT_HOME", str(trained_home.root))
    stage, command, flags = RUNS[name]

    def run(tag: str) -> Any:
        if command == "pretrain":
            return launch(trained_home.pretrain_words(**flags, model_tag=tag))
        words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        return launch([command, "--no-compile", *words, "--output-tag", tag], before=PAID)

    def saved(tag: str) -> list[Path]:
        directory = trained_home.checkpoint_dir(stage, tag)
        return [find_checkpoint(directory, step) for step in list_checkpoints(directory)]

    whole = run("whole")
    assert whole.wait() == 0, whole.output()
    figures = json.loads(next(trained_home.root.glob("runs/whole*/summary.json")).read_text())
    child = run("killed")
    child.wait_for(lambda: saved("killed"))
    time.sleep(Random().uniform(0, figures["training_seconds"] / 4))
    child.send_signal(signal.SIGKILL)
    assert child.wait() in (-signal.SIGKILL, 0)
    again = run("killed")
    assert again.wait() == 0, again.output()
    assert_same_run(*(trained_home.checkpoint_dir(stage, tag) for tag in ("whole", "killed")))
    before, last = (load_checkpoint(path).state["model"] for path in saved("whole"))
    assert any(not torch.equal(before[name], last[name]) for name in last)  # it learns to the end


@pytest.mark.slow
def test_a_compiled_run_that_is_killed_resumes_bit_for_bit(
    tiny_home: Any, launch: Launch, assert_same_run: Callable[..., None]
) -> None:
    """In the default dtype of new CPUs; uncompiled runs above have float32 too."""
    run = FORTY_STEPS | {"dtype": "bfloat16", "compile": True, "save_every": 8, "eval_every": 8}
    whole = launch(tiny_home.pretrain_words(**run, model_tag="whole"))
    assert whole.wait() == 0
    child = launch(tiny_home.pretrain_words(**run, model_tag="killed"))
    wait_for_step(tiny_home, 8, child)
    time.sleep(Random().uniform(0, 0.3))
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert launch(tiny_home.pretrain_words(**run, model_tag="killed")).wait() == 0
    assert_same_run(*(tiny_home.checkpoint_dir("base", tag) for tag in ("whole", "killed")), 40)


def test_a_run_can_go_back_to_an_older_checkpoint(
    tiny_home: Any, capsys: pytest.CaptureFixture[str], assert_same_run: Callable[..., None]
) -> None:
    run = {"num_iterations": 6, "save_every": 2, "keep_last": 3}
    assert tiny_home.pretrain(**run, model_tag="whole") == 0
    stage = tiny_home.stage_dir("base")
    shutil.copytree(stage / "whole", stage / "again")
    capsys.readouterr()
    assert tiny_home.pretrain(**run, model_tag="again", resume_from_step=2) == 0
    assert f"resuming from {stage / 'again' / 'step_000002'}\n" in capsys.readouterr().out
    for step in (4, 6):
        assert_same_run(
            *(tiny_home.checkpoint_dir("base", tag) for tag in ("whole", "again")), step
        )
    assert tiny_home.pretrain(**run, model_tag="again", resume_from_step=3) == 2
    assert "no step 3 in" in capsys.readouterr().err
    assert tiny_home.pretrain(**run, model_tag="new", resume_from_step=2) == 2
    assert "leave --resume-from-step out" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_says_where_and_goes_on(
    tiny_home: Any, launch: Launch, number: signal.Signals, assert_same_run: Callable[..., None]
) -> None:
    run = {"num_iterations": 40, "save_every": None, "eval_every": None, "sample_every": None}
    child = launch(tiny_home.pretrain_words(**run))
    wait_for_line(child, "step 1/40")
    child.send_signal(number)
    assert child.wait() == 130
    output = child.output()
    (step,) = tiny_home.steps()
    assert 0 < step < 40
    directory = tiny_home.checkpoint_dir("base", "tiny")
    assert "and saving; press Ctrl-C again to stop at once: no checkpoint is saved yet" in output
    assert output.splitlines()[-1] == (
        f"stopped at step {step} of 40; the checkpoint is in {directory}. Run the same command to "
        "resume"
    )
    assert tiny_home.pretrain(**run) == 0
    assert tiny_home.pretrain(**run, model_tag="whole") == 0
    assert_same_run(*(tiny_home.checkpoint_dir("base", tag) for tag in ("tiny", "whole")), 40)


SAY_BACKWARD = """
import torch
plain = torch.Tensor.backward
def backward(*given):
    print("\\nbackward", flush=True)
    plain(*given)
torch.Tensor.backward = backward
"""


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_process_at_once(
    tiny_home: Any, launch: Callable[..., Any]
) -> None:
    minutes = {"total_batch_size": 2**23, "save_every": 1}
    child = launch(tiny_home.pretrain_words(**minutes), before=SAY_BACKWARD)
    wait_for_line(child, "backward")  # in the middle of the first step
    child.send_signal(signal.SIGINT)
    time.sleep(SAME_REQUEST_SECONDS + 0.1)
    assert child.process.is_alive()  # it waits for the end of the step
    child.send_signal(signal.SIGINT)
    assert child.wait() == 130
    output = child.output()
    assert output.endswith("interrupted\n")  # maybe in the middle of a line
    assert "Traceback" not in output
    assert tiny_home.steps() == []
