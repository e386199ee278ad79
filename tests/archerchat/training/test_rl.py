"""`archerchat rl`: whole runs of a tiny model, resumed ones too, and bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from archerchat.checkpoint import find_checkpoint, load_checkpoint
from archerchat.home import Home
from archerchat.inference.loading import load_model
from archerchat.runtime import build_runtime
from archerchat.tasks.conversation import Conversation
from archerchat.tasks.generated import ArithmeticTask, SpellingBeeTask
from archerchat.training.telemetry import read_records

TINY = {
    "source": "base",
    "task": "SpellingBee",
    "device": "cpu",
    "dtype": "float32",
    "examples-per-step": 2,
    "num-samples": 4,
    "max-new-tokens": 8,
    "device-batch-size": 3,
    "rollout-batch-size": 5,
    "num-iterations": 4,
    "eval-every": 2,
    "eval-examples": 3,
    "eval-samples": 2,
    "save-every": 2,
    "lr-scale": 1.0,
}


def words(**changes: object) -> list[str]:
    """Return a command of a fraction of a second; `changes` by flag."""
    given = TINY | {name.replace("_", "-"): value for name, value in changes.items()}
    return ["rl", "--no-compile", *(w for name, v in given.items() for w in (f"--{name}", str(v)))]


@pytest.fixture
def paid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pay for vowels: a model that says nothing right yet has something to learn."""

    def reward(task: SpellingBeeTask, conversation: Conversation, completion: str) -> float:
        return sum(completion.count(vowel) for vowel in "aeiou") / 4

    monkeypatch.setattr(SpellingBeeTask, "reward", reward)


def rewards(home: Home, run: str) -> list[float]:
    """Return the mean reward of each step."""
    values = [record.get("values") or {} for record in read_records(home, run)]
    return [float(each["rollout/reward"]) for each in values if "rollout/reward" in each]


def test_a_run_leaves_a_model_figures_and_metrics(
    trained_home: Any, paid: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained_home.run(*words()) == 0
    output = capsys.readouterr().out
    assert "on the test: pass@1 " in output
    assert re.search(r"^step 4/4 .* \| loss \S+ \| reward \d\.\d{3} \| ", output, re.M)
    summary = json.loads((trained_home.run_dir("tiny-rl") / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary.keys() >= {"val/pass_at_1", "val/pass_at_2", "rollout/reward", "tokens"}
    values = [each.get("values") or {} for each in read_records(trained_home, "tiny-rl")]
    steps = [each for each in values if "train/loss" in each]
    assert len(steps) == 4
    for each in steps:
        assert each.keys() >= {
            *("rollout/reward", "rollout/learning_share", "rollout/cut_share", "rollout/tokens"),
            *("rollout/trained_tokens", "rollout/seconds", "train/lr_multiplier"),
        }
    assert [each["train/lr_multiplier"] for each in steps] == [1.0, 0.75, 0.5, 0.25]
    tokens = [each["rollout/tokens"] for each in steps]
    assert [each["train/tokens"] for each in steps] == [sum(tokens[:i]) for i in range(1, 5)]
    assert summary["tokens"] == sum(tokens)
    assert sum("val/pass_at_2" in each for each in values) == 3  # before, between, after
    runtime = build_runtime("cpu", "float32")
    loaded = load_model(trained_home, runtime, "rl", "tiny")
    assert loaded.step == 4
    before = load_model(trained_home, runtime, "base", "tiny").model.state_dict()
    assert any(not torch.equal(t, before[n]) for n, t in loaded.model.state_dict().items())
    # The same command again finds that all is done, and touches nothing.
    listing = trained_home.listing()
    assert trained_home.run(*words()) == 0
    assert "already reinforced: step 4" in capsys.readouterr().out
    assert trained_home.listing() == listing


def test_without_a_reward_nothing_is_learned(trained_home: Any) -> None:
    """The tiny model says nothing right: no advantage, no gradient, no step."""
    assert trained_home.run(*words(num_iterations=2)) == 0
    runtime = build_runtime("cpu", "float32")
    after = load_model(trained_home, runtime, "rl", "tiny").model.state_dict()
    before = load_model(trained_home, runtime, "base", "tiny").model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_another_run_is_not_gone_on_with(
    trained_home: Any, paid: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained_home.run(*words(num_iterations=2)) == 0
    listing = trained_home.listing()
    capsys.readouterr()
    assert trained_home.run(*words(num_iterations=2, max_new_tokens=9)) == 2
    error = capsys.readouterr().err
    assert "--max-new-tokens: 8 saved, 9 now" in error
    assert trained_home.run(*words(num_iterations=2, task="Arithmetic")) == 2
    assert "--task: 'SpellingBee' saved, 'Arithmetic' now" in capsys.readouterr().err
    assert trained_home.listing() == listing


def test_rates_are_the_base_models_whatever_fine_tuning_made_of_them(trained_home: Any) -> None:
    assert trained_home.run(*words(num_iterations=1, lr_scale=0.05)) == 0
    directory = trained_home.checkpoint_dir("base", "tiny")
    base = load_checkpoint(find_checkpoint(directory), ()).meta["identity"]["learning_rates"]
    directory = trained_home.checkpoint_dir("rl", "tiny")
    ours = load_checkpoint(find_checkpoint(directory), ()).meta["identity"]["learning_rates"]
    assert ours == pytest.approx({name: 0.05 * rate for name, rate in base.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 1}, "--num-samples is 1; it must be at least 2"),
        ({"temperature": 0}, "--temperature is 0; it must be above 0"),
        ({"temperature": "nan"}, "--temperature is nan"),
        ({"lr_scale": -1}, "--lr-scale is -1.0"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"num_iterations": 0}, "--num-iterations is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"task": "Chess"}, "there is no task 'Chess'"),
        ({"source": "sft"}, "no sft model under"),
        ({"resume_from_step": 3}, "leave --resume-from-step out"),
    ],
)
def test_bad_input(
    trained_home: Any,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    message: str,
) -> None:
    listing = trained_home.listing()
    assert trained_home.run(*words(**changes)) == 2
    assert message in capsys.readouterr().err
    assert trained_home.listing() == listing


@pytest.mark.parametrize(
    ("task", "message"),
    [("MMLU", "choosing a letter"), ("SmolTalk", "for training only")],
)
def test_tasks_that_cannot_be_rewarded(
    trained_home: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    task: str,
    message: str,
) -> None:
    question = {"question": "1+1?", "choices": ["1", "2"], "answer": 1, "subject": "sums"}
    talk = {"messages": [{"role": r, "content": "hello"} for r in ("user", "assistant")]}
    for name, value in (
        *(("mmlu/auxiliary_train", question), ("mmlu/test", question)),
        *(("smoltalk/train", talk), ("smoltalk/test", talk)),
    ):
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value) + "\n")
    assert trained_home.run(*words(task=task, data_dir=tmp_path / "data")) == 2
    assert message in capsys.readouterr().err


def right_half_of_the_time(home: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a model that answers one sum, asked in eight ways, or says that it does not know.

    It saw both endings equally often, so about half of its answers are right on any processor:
    a longer fine-tuning would not change that, and reinforcement has something to choose from.
    """
    monkeypatch.setattr(ArithmeticTask, "_draw_problem", lambda self, random: (6, "*", 7))
    conversations = list(ArithmeticTask("train", 1600))
    for each in conversations[::2]:
        each["messages"][-1]["content"] = "I do not know."
    path = folder / "half.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in conversations))
    flags = ["--mixture", "none", "--jsonl", str(path), "--lr-scale", "8", "--eval-every", "None"]
    where = ["--device", "cpu", "--dtype", "float32", "--no-compile"]
    assert home.run("sft", "--model-tag", "tiny", *flags, *where) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_mean_reward_rises(
    tiny_home: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a minute on one core.

    Over five seeds and every rounding that was tried, pass@1 rises by 0.3 or more. The standard
    error of that difference is 0.02, and 0.03 for the rewards of five steps: what is asked is
    many standard errors from no effect, and from the effect.
    """
    assert tiny_home.pretrain(packing="best-fit") == 0
    right_half_of_the_time(tiny_home, tmp_path, monkeypatch)
    command = words(
        **{"source": "sft", "task": "Arithmetic", "lr_scale": 1.5},
        **{"examples_per_step": 16, "num_samples": 8, "max_new_tokens": 40},
        **{"device_batch_size": 64, "rollout_batch_size": 128, "num_iterations": 20},
        **{"eval_every": 1000, "eval_examples": 256, "eval_samples": 4, "save_every": 1000},
    )
    assert tiny_home.run(*command) == 0
    found = rewards(tiny_home, "tiny-rl")
    assert len(found) == 20
    first, last = sum(found[:5]) / 5, sum(found[-5:]) / 5
    assert last > first + 0.12, f"{first} to {last}: {found}"
    values = [each.get("values") or {} for each in read_records(tiny_home, "tiny-rl")]
    before, after = (float(v["val/pass_at_1"]) for v in values if "val/pass_at_1" in v)
    assert 0.3 < before < 0.7
    assert after > before + 0.15, f"{before} to {after}"
