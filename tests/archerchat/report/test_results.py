"""Results of evaluations: the kinds, what is unfinished or capped, what is damaged."""

from __future__ import annotations

from typing import Any

import pytest

from archerchat.evals.chat import ChatTaskResult
from archerchat.evals.core.evaluate import CoreResult, CoreTaskResult, PartialResults
from archerchat.files import write_json
from archerchat.home import Home
from archerchat.report.runs import Result, latest, load_results

TASK = {
    "label": "copa",
    "task_type": "multiple_choice",
    "random_baseline": 0.25,
    "examples": 8,
    "correct": 4,
    "seconds": 2.0,
}
WHOLE = {"max_per_task": None, "max_length": None}
"""Options of an evaluation of everything, as are its sampling parameters."""
GREEDY = {"temperature": 0.0, "num_samples": 1, "max_new_tokens": 512}


def mmlu(correct: int, examples: int) -> dict[str, Any]:
    return ChatTaskResult(
        label="MMLU",
        task_type="categorical",
        examples=examples,
        correct=correct,
        random_baseline=0.25,
        seconds=2.0,
        pass_at={},
    ).to_json()


def load(home: Home, name: str, **content: Any) -> Result | None:
    write_json(home.eval_dir("base", "d8") / name, content)
    found = load_results(home, "base", "d8")
    return found[0] if found else None


def test_core(home: Home) -> None:
    options = {"max_per_task": 8, "max_length": None}
    result = load(home, "core_4.json", core=0.25, tasks=[TASK] * 22, step=4, options=options)
    assert result is not None
    assert (result.kind, result.score, result.step) == ("core", 0.25, 4)
    assert result.conditions == ["at most 8 per task"]
    assert result.complete
    task, *_ = result.tasks
    assert (task.label, task.accuracy, task.examples, task.seconds) == ("copa", 0.5, 8, 2.0)
    assert task.centred == pytest.approx(1 / 3)


def test_what_an_evaluation_writes_is_read(home: Home) -> None:
    """Through the evaluations' own code: CORE, the offline tasks, and one that is unfinished."""
    folder = home.eval_dir("base", "d8")
    folder.mkdir(parents=True)
    task = CoreTaskResult(
        label="copa",
        task_type="multiple_choice",
        examples=200,
        correct=30,
        random_baseline=0.5,
        seconds=3.0,
        num_fewshot=0,
        prompt_tokens=10,
        tokens_run=10,
    )
    about = {"step": 6, "options": WHOLE}
    write_json(folder / "core_000006.json", {**about, **CoreResult((task,)).to_json()})
    write_json(folder / "offline_000006.json", {**about, **CoreResult((task, task)).to_json()})
    PartialResults(folder / "core_000007.partial.json", about | {"step": 7}).add(task)
    partial, core, offline = load_results(home, "base", "d8")
    assert (core.kind, core.step, core.conditions) == ("core", 6, ["1 of 22 tasks"])
    assert core.score == pytest.approx(task.centred)
    assert core.tasks[0].interval == pytest.approx((0.1072, 0.2061), abs=1e-4)
    assert core.tasks[0].centred == pytest.approx(task.centred)
    assert (offline.kind, len(offline.tasks), offline.conditions) == ("offline", 2, [])
    assert (partial.step, partial.complete, partial.score) == (7, False, None)


def test_chat(home: Home) -> None:
    task = mmlu(3, 4)
    folder = "chat_step_000004.json"
    about = {"sampling": GREEDY, "limits": {"MMLU": None}, "step": 4, "complete": False}
    result = load(home, folder, tasks={"MMLU": task}, **about)
    assert result is not None
    assert (result.kind, result.score, result.complete) == ("chat", None, False)
    assert result.tasks[0].interval == pytest.approx(tuple(task["interval_95"]))
    assert result.tasks[0].centred == pytest.approx(2 / 3)
    assert result.tasks[0].seconds == 2.0


def test_the_fullest_chat_evaluation_of_a_step_counts(home: Home) -> None:
    def task(problems: int) -> dict[str, Any]:
        return mmlu(problems, problems)

    folder = home.eval_dir("sft", "d8")
    for name, score, problems, limit, sampling in (
        ("a", 0.2, 9, None, GREEDY),
        ("b", 0.3, 4, 4, GREEDY),
        ("c", 0.4, 9, None, GREEDY | {"temperature": 1.0, "num_samples": 4}),
        ("d", None, 12, None, GREEDY),  # one task, and no ChatCORE
    ):
        about = {"step": 4, "limits": {"MMLU": limit}, "sampling": sampling, "complete": True}
        content = about | {"chatcore": score, "tasks": {"MMLU": task(problems)}}
        write_json(folder / f"chat_step_000004_{name}.json", content)
    results = load_results(home, "sft", "d8")
    assert [result.score for result in results] == [None, 0.3, 0.4, 0.2]
    assert [result.conditions for result in results[1:]] == [
        ["at most 4 per task"],
        ["4 sample(s) at temperature 1"],
        [],
    ]


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        "{",
        '{"step": 1, "tasks": 3}',
        '{"step": 1, "tasks": {"a": 1}}',
        '{"core": 1}',
        '{"step": 1, "tasks": [], "options": {"max_per_task": null, "max_length": null}}',
        "\xff",
    ],
)
def test_damaged_files_are_skipped(home: Home, content: str) -> None:
    folder = home.eval_dir("base", "d8")
    folder.mkdir(parents=True)
    (folder / "core_1.json").write_bytes(content.encode("latin-1"))
    (folder / "notes.json").write_text('{"core": 1, "step": 1, "tasks": {}}')
    assert load_results(home, "base", "d8") == []


def test_the_latest_is_the_last_that_is_whole(home: Home) -> None:
    folder = home.eval_dir("base", "d8")
    figures = {"core": 0.1, "tasks": [TASK] * 22, "options": WHOLE}
    for step in (2, 4):
        write_json(folder / f"core_{step}.json", figures | {"step": step})
    running = {"key": {"step": 6, "options": WHOLE}, "tasks": [TASK]}
    write_json(folder / "core_6.partial.json", running)
    for cap in (5, 7):  # of the same step: the full one counts
        tasks, options = [TASK | {"examples": cap}] * 22, WHOLE | {"max_per_task": cap}
        capped = {"core": 0.2, "tasks": tasks, "step": 4, "options": options}
        write_json(folder / f"core_4_max{cap}.json", capped)
    results = load_results(home, "base", "d8")
    found = [(r.step, r.tasks[0].examples) for r in results]
    assert found == [(6, 8), (2, 8), (4, 5), (4, 7), (4, 8)]
    chosen = latest(results, "core")
    assert chosen is not None
    assert (chosen.step, chosen.conditions) == (4, [])
    assert latest(results, "core", "base") == chosen
    assert latest(results, "core", "sft") is None
    assert latest(results, "chat") is None
