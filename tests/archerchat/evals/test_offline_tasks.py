"""The generated bundle: read like any other, solvable by reading, the same each time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from archerchat.evals.core.bundle import TASK_TYPES, Example, load_bundle, read_examples
from archerchat.evals.core.download import find_bundle
from archerchat.evals.core.results import CoreResult, TaskResult, describe, is_offline
from archerchat.evals.offline_tasks import (
    BRACKETS,
    EXAMPLES,
    NAME,
    OFFLINE_TASKS,
    PREFIX,
    iter_examples,
    offline_bundle,
)


def examples(cache: Path, label: str) -> list[Example]:
    bundle = load_bundle(offline_bundle(cache))
    return read_examples(next(task for task in bundle.tasks if task.label == label))


def test_the_bundle_has_every_format_with_and_without_shots(tmp_path: Path) -> None:
    bundle = load_bundle(offline_bundle(tmp_path))
    kinds = {(task.task_type, task.num_fewshot > 0) for task in bundle.tasks}
    assert kinds == {(kind, shots) for kind in TASK_TYPES for shots in (False, True)}
    assert all(task.label.startswith(PREFIX) for task in bundle.tasks)
    assert all(len(read_examples(task)) == EXAMPLES for task in bundle.tasks)


def test_guessing_scores_what_the_baseline_says(tmp_path: Path) -> None:
    for task in load_bundle(offline_bundle(tmp_path)).tasks:
        for example in read_examples(task):
            options = max(len(example.questions), len(example.answers))
            chance = 0.0 if options == 1 else 1 / options
            assert task.random_baseline == pytest.approx(chance)


def test_gold_is_spread_over_the_options(tmp_path: Path) -> None:
    """Who always takes one option gets no more than a little over chance."""
    for task in load_bundle(offline_bundle(tmp_path)).tasks:
        golds = [example.gold for example in read_examples(task)]
        most = max(golds.count(gold) for gold in set(golds)) / len(golds)
        assert task.random_baseline == 0 or most < task.random_baseline + 0.2


def test_answers_follow_from_the_questions(tmp_path: Path) -> None:
    for example in examples(tmp_path, "offline_quoted_word"):
        quoted = [f'"{answer}"' in example.questions[0] for answer in example.answers]
        assert quoted.index(True) == example.gold
        assert sum(quoted) == 1
    for example in examples(tmp_path, "offline_closing_bracket"):
        opened = next(c for c in example.questions[0] if c in BRACKETS)
        assert example.answers[example.gold] == BRACKETS[opened]
    for label in ("offline_imported_name", "offline_defined_argument"):
        for example in examples(tmp_path, label):
            name = example.answers[0].removesuffix("()")
            holds = [f"import {name}" in q or f"({name})" in q for q in example.questions]
            assert holds.index(True) == example.gold
            assert sum(holds) == 1
    for example in examples(tmp_path, "offline_repeated_list"):
        assert example.questions[0].split("\n")[0].endswith(f", {example.answers[0]}.")
    for example in examples(tmp_path, "offline_next_number"):
        numbers = [int(n) for n in example.questions[0].rstrip(",").split(",")]
        assert int(example.answers[0]) == numbers[-1] + 1 == numbers[0] + 4


def test_the_bundle_is_written_once_and_is_the_same_everywhere(tmp_path: Path) -> None:
    first, second = offline_bundle(tmp_path / "a"), offline_bundle(tmp_path / "b")
    assert first.name == second.name
    assert load_bundle(first).fingerprint() == load_bundle(second).fingerprint()
    marker = first / "core.yaml"
    before = marker.stat().st_mtime_ns
    assert offline_bundle(tmp_path / "a") == first
    assert marker.stat().st_mtime_ns == before


def test_the_command_line_finds_it_by_name(tmp_path: Path) -> None:
    assert find_bundle(NAME, tmp_path) == offline_bundle(tmp_path)


def test_results_say_that_they_are_not_core() -> None:
    results = [
        TaskResult(task.label, task.task_type, task.num_fewshot, 48, 24, 0.0, 1.0, 100, 50)
        for task in OFFLINE_TASKS
    ]
    assert "not CORE" in describe(CoreResult(tuple(results)))[0]
    assert not is_offline([*results, replace(results[0], label="copa")])


def test_no_example_stands_twice() -> None:
    for task in OFFLINE_TASKS:
        rows = [str(row) for row in iter_examples(task)]
        assert len(set(rows)) == EXAMPLES
