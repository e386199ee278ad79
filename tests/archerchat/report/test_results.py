"""Results of evaluations, whatever wrote them and whatever they lack."""

from __future__ import annotations

from typing import Any

import pytest

from archerchat.files import write_json
from archerchat.home import Home
from archerchat.report.results import Result, latest, load_results

TASK = {"accuracy": 0.5, "centred": 0.25, "random_baseline": 0.25, "examples": 8, "seconds": 2.0}


def load(home: Home, **content: Any) -> Result | None:
    write_json(home.root / "evals" / "base" / "d8" / "one.json", content)
    found = load_results(home, "base", "d8")
    return found[0] if found else None


def test_core(home: Home) -> None:
    result = load(home, core=0.25, tasks={"copa": TASK}, step=4, options={"max_per_task": 8})
    assert result is not None
    assert (result.kind, result.score, result.step, result.cap) == ("core", 0.25, 4, 8)
    assert (result.complete, result.seconds) == (True, 2.0)
    (task,) = result.tasks
    assert (task.label, task.accuracy, task.centred, task.examples) == ("copa", 0.5, 0.25, 8)


def test_tasks_may_be_a_list(home: Home) -> None:
    result = load(home, core=0.1, tasks=[TASK | {"label": "copa", "centered": 0.2}, "?"])
    assert result is not None
    assert [task.label for task in result.tasks] == ["copa"]


def test_generated_tasks_are_not_core(home: Home) -> None:
    tasks = {"offline_a": TASK, "offline_b": TASK | {"centred": 0.75}}
    result = load(home, core=0.5, tasks=tasks)
    assert result is not None
    assert (result.kind, result.score) == ("offline", 0.5)
    mixed = load(home, core=0.5, tasks={"offline_a": TASK, "copa": TASK})
    assert mixed is not None
    assert mixed.kind == "core"


def test_counts_give_an_interval(home: Home) -> None:
    result = load(home, core=0.1, tasks=[TASK | {"label": "copa", "correct": 30, "examples": 200}])
    assert result is not None
    assert result.tasks[0].interval == pytest.approx((0.1072, 0.2061), abs=1e-4)
    broken = load(home, core=0.1, tasks=[TASK | {"label": "copa", "correct": 9, "examples": 8}])
    assert broken is not None
    assert broken.tasks[0].interval is None


def test_an_unfinished_core(home: Home) -> None:
    result = load(home, key={"step": 4, "options": {}}, tasks=[TASK | {"label": "copa"}])
    assert result is not None
    assert (result.kind, result.step, result.complete) == ("core", 4, False)
    assert result.score is None


def test_chat(home: Home) -> None:
    tasks = {"MMLU": {"accuracy": 0.5, "problems": 4, "interval_95": [0.2, 0.8]}}
    result = load(home, sampling={}, tasks=tasks, complete=False)
    assert result is not None
    assert (result.kind, result.score, result.complete) == ("chat", None, False)
    assert result.tasks[0].interval == (0.2, 0.8)
    assert result.tasks[0].centred is None


def test_bits_alone(home: Home) -> None:
    result = load(home, bits_per_byte={"train": 1.0, "val": 1.1})
    assert result is not None
    assert (result.kind, result.bits_per_byte) == ("bits", {"train": 1.0, "val": 1.1})


@pytest.mark.parametrize("content", ["[1]", "{", '{"tasks": 3}', '{"tasks": {"a": 1}}', "\xff"])
def test_other_files_are_passed_over(home: Home, content: str) -> None:
    path = home.root / "evals" / "base" / "d8" / "x.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("latin-1"))
    assert load_results(home, "base", "d8") == []


def test_the_latest_is_the_last_that_is_whole(home: Home) -> None:
    folder = home.root / "evals" / "base" / "d8"
    for step, complete in ((2, True), (4, True), (6, False)):
        figures = {"core": 0.1, "tasks": {"copa": TASK}, "step": step, "complete": complete}
        write_json(folder / f"core_{step}.json", figures)
    results = load_results(home, "base", "d8")
    assert [result.step for result in results] == [2, 4, 6]
    chosen = latest(results, "core")
    assert chosen is not None
    assert chosen.step == 4
    assert latest(results, "chat") is None
