"""`archerchat eval chat`: tasks, limits, figures on disk, several ranks, and bad input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from archerchat.commands.eval_chat import SAMPLING, file_name, parse_tasks
from archerchat.errors import UsageError
from archerchat.evals.chat import evaluate_task
from archerchat.tasks.registry import CHATCORE

QUICK = (
    *("eval", "chat", "--source", "base", "--device", "cpu", "--dtype", "float32"),
    *("--max-new-tokens", "4"),
)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Questions in the hub's format."""
    folder = tmp_path / "data"
    questions = [
        {
            "question": f"Which is {number}?",
            "choices": {"text": ["this", "that"], "label": ["A", "B"]},
            "answerKey": "AB"[number % 2],
        }
        for number in range(10)
    ]
    for name in ("ARC-Easy", "ARC-Challenge"):
        (folder / "arc" / name).mkdir(parents=True)
        lines = (json.dumps(question) + "\n" for question in questions)
        (folder / "arc" / name / "test.jsonl").write_text("".join(lines))
    (folder / "gsm8k").mkdir()
    problem = {"question": "One and one?", "answer": "1+1=<<1+1=2>>2\n#### 2"}
    (folder / "gsm8k" / "test.jsonl").write_text((json.dumps(problem) + "\n") * 5)
    return folder


def run(home: Any, data_dir: Path, *words: str) -> int:
    code: int = home.run(*QUICK, "--data-dir", str(data_dir), *words)
    return code


def figures(home: Any) -> dict[str, Any]:
    (path,) = (home.root / "evals" / "base" / "tiny").iterdir()
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_it_evaluates_and_keeps_the_figures(
    trained_home: Any, data_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answers = tmp_path / "answers.jsonl"
    words = ("--tasks", "arc-easy,GSM8K:3,SpellingBee:2", "--answers", str(answers))
    assert run(trained_home, data_dir, *words) == 0
    output = capsys.readouterr().out
    found = figures(trained_home)
    assert found["complete"] is True
    assert (found["model_tag"], found["source"], found["step"]) == ("tiny", "base", 4)
    assert list(found["tasks"]) == ["ARC-Easy", "GSM8K", "SpellingBee"]
    assert [task["problems"] for task in found["tasks"].values()] == [10, 3, 2]
    assert "chatcore" not in found
    letters = found["tasks"]["ARC-Easy"]
    # Whichever letter it likes, each question's or the same one's: five of ten are right for one.
    assert letters["accuracy"] * 10 == pytest.approx(round(letters["accuracy"] * 10))
    low, high = letters["interval_95"]
    assert low < letters["accuracy"] < high
    assert re.search(rf"ARC-Easy +10 +{letters['accuracy']:.4f} +0", output)
    assert letters["lenient_accuracy"] is None
    assert found["tasks"]["GSM8K"]["lenient_accuracy"] == 0.0
    assert re.search(r"task +problems +accuracy +95 % interval +lenient +guessing +centred", output)
    assert re.search(r"GSM8K +3 +0\.0000 +0\.0000–0\.5615 +0\.0000 +0\.00 +0\.0000", output)
    assert "; 0.00 % leniently" in output
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["task"] for line in lines] == ["GSM8K"] * 3 + ["SpellingBee"] * 2
    assert not any(line["right"] or line["lenient"] for line in lines)
    assert {line["finish_reason"] for line in lines} <= {"stop", "max_tokens", "length"}


def test_several_samples_give_pass_at_k(trained_home: Any, data_dir: Path) -> None:
    words = ("--tasks", "GSM8K", "--max-problems", "2", "--num-samples", "4", "--temperature", "1")
    assert run(trained_home, data_dir, *words) == 0
    task = figures(trained_home)["tasks"]["GSM8K"]
    assert task["pass_at"].keys() == {"1", "2", "4"}
    assert (task["problems"], task["num_samples"]) == (2, 4)


def test_the_figures_can_go_elsewhere(trained_home: Any, data_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "figures.json"
    assert run(trained_home, data_dir, "--tasks", "ARC-Easy:2", "--json", str(path)) == 0
    assert json.loads(path.read_text())["tasks"]["ARC-Easy"]["problems"] == 2
    assert not (trained_home.root / "evals").exists()


def test_figures_never_replace_those_of_other_conditions(
    trained_home: Any, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = ("--tasks", "SpellingBee:4,GSM8K:1"), trained_home.eval_dir("base", "tiny")
    for words in (whole, ("--tasks", "SpellingBee:2"), (*whole, "--temperature", "1")):
        assert run(trained_home, data_dir, *words) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before) == 3

    def interrupted(engine: Any, tokenizer: Any, task: Any, *rest: Any) -> Any:
        if task.name == "GSM8K":
            raise KeyboardInterrupt
        return evaluate_task(engine, tokenizer, task, *rest)

    monkeypatch.setattr("archerchat.commands.eval_chat.evaluate_task", interrupted)
    assert run(trained_home, data_dir, *whole) == 130
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    (partial,) = after.keys() - before.keys()
    assert partial == "chat_step_000004_GSM8K-1_SpellingBee-4_" + partial[-21:]
    assert before.items() <= after.items()
    assert json.loads(after[partial])["complete"] is False


def test_the_whole_of_chatcore_has_the_plain_name() -> None:
    whole = dict.fromkeys(CHATCORE)
    assert file_name(420, whole, SAMPLING) == "chat_step_000420.json"
    assert file_name(420, {"B": 2, "A": None}, SAMPLING) == "chat_step_000420_A_B-2.json"
    assert len({file_name(4, whole, replace(SAMPLING, seed=seed)) for seed in (1, 2)}) == 2


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(
    trained_home: Any, data_dir: Path, run_ranks: Callable[..., Any]
) -> None:
    words = [*QUICK, "--data-dir", str(data_dir), "--tasks", "ARC-Easy,GSM8K,SpellingBee:7"]
    words += ["--num-samples", "2", "--temperature", "1"]
    assert trained_home.run(*words) == 0
    alone = figures(trained_home)
    done = run_ranks(trained_home, 2, words)
    assert done.returncode == 0, done.stderr
    together = figures(trained_home)
    assert (alone.pop("ranks"), together.pop("ranks")) == (1, 2)
    for found in (alone, together):
        for task in found["tasks"].values():
            task.pop("seconds")
    assert together == alone
    assert done.stdout.count("ARC-Easy:") == 1  # one rank speaks


def test_tasks_and_limits() -> None:
    assert parse_tasks(None) == dict.fromkeys(CHATCORE)
    assert parse_tasks(None, 7) == dict.fromkeys(CHATCORE, 7)
    assert parse_tasks("gsm8k:200, mmlu", 50) == {"GSM8K": 200, "MMLU": 50}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("GSM9K", "--tasks: there is no task 'GSM9K': choose from ARC-Easy"),
        ("GSM8K,gsm8k", "a task is named twice"),
        ("GSM8K*2", "a task is named twice"),
        ("GSM8K:", "'GSM8K:' cannot be read: write a task's name"),
        ("GSM8K:many", "'GSM8K:many' cannot be read"),
        ("GSM8K:0", "'GSM8K:0' cannot be read"),
        ("", "'' cannot be read"),
    ],
)
def test_bad_tasks(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_tasks(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-problems", "0"), "--max-problems is 0"),
        (("--num-samples", "0"), "--num-samples is 0"),
        (("--max-new-tokens", "0"), "--max-new-tokens is 0"),
        (("--temperature", "-1"), "--temperature is -1"),
        (("--temperature", "nan"), "--temperature is nan"),
        (("--seed", "-1"), "--seed is -1"),
        (("--num-samples", "2"), "2 samples at temperature 0"),
        (("--tasks", "MMLU"), "no mmlu/test with one of"),
        (("--tasks", "SmolTalk"), "no smoltalk/test"),
        (("--model-tag", "other"), "no base model 'other'"),
    ],
)
def test_bad_input(
    trained_home: Any,
    data_dir: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    assert run(trained_home, data_dir, *words) in (1, 2)
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    assert message in error
    assert not (trained_home.root / "evals").exists()
