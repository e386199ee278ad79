"""The package's own bundle: read like any other, solvable by reading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from archerchat.evals.core.bundle import (
    COLUMNS,
    OFFLINE_BUNDLE,
    CoreTask,
    Example,
    find_bundle,
    load_bundle,
    read_examples,
)
from archerchat.evals.core.evaluate import CoreResult, CoreTaskResult, describe, is_offline

BRACKETS = {"(": ")", "[": "]", "{": "}"}


@pytest.fixture(scope="module")
def tasks() -> tuple[CoreTask, ...]:
    return load_bundle(OFFLINE_BUNDLE).tasks


def examples(label: str) -> list[Example]:
    bundle = load_bundle(OFFLINE_BUNDLE)
    return read_examples(next(task for task in bundle.tasks if task.label == label))


def test_the_bundle_has_every_format_with_and_without_shots(tasks: tuple[CoreTask, ...]) -> None:
    kinds = {(task.task_type, task.num_fewshot > 0) for task in tasks}
    assert kinds == {(kind, shots) for kind in COLUMNS for shots in (False, True)}
    assert is_offline(tasks)
    assert all(len(set(read_examples(task))) == 48 for task in tasks)  # no two alike


def test_guessing_scores_what_the_baseline_says(tasks: tuple[CoreTask, ...]) -> None:
    for task in tasks:
        for example in read_examples(task):
            options = max(len(example.questions), len(example.answers))
            chance = 0.0 if options == 1 else 1 / options
            assert task.random_baseline == pytest.approx(chance)


def test_gold_is_spread_over_the_options(tasks: tuple[CoreTask, ...]) -> None:
    """Who always takes one option gets no more than a little over chance."""
    for task in tasks:
        golds = [example.gold for example in read_examples(task)]
        most = max(golds.count(gold) for gold in set(golds)) / len(golds)
        assert task.random_baseline == 0 or most < task.random_baseline + 0.2


def test_answers_follow_from_the_questions() -> None:
    for example in examples("offline_quoted_word"):
        quoted = [f'"{answer}"' in example.questions[0] for answer in example.answers]
        assert quoted.index(True) == example.gold
        assert sum(quoted) == 1
    for example in examples("offline_closing_bracket"):
        opened = next(c for c in example.questions[0] if c in BRACKETS)
        assert example.answers[example.gold] == BRACKETS[opened]
    for label in ("offline_imported_name", "offline_defined_argument"):
        for example in examples(label):
            name = example.answers[0].removesuffix("()")
            holds = [f"import {name}" in q or f"({name})" in q for q in example.questions]
            assert holds.index(True) == example.gold
            assert sum(holds) == 1
    for example in examples("offline_repeated_list"):
        assert example.questions[0].split("\n")[0].endswith(f", {example.answers[0]}.")
    for example in examples("offline_next_number"):
        numbers = [int(n) for n in example.questions[0].rstrip(",").split(",")]
        assert int(example.answers[0]) == numbers[-1] + 1 == numbers[0] + 4


def test_the_command_line_finds_it_by_name(tmp_path: Path) -> None:
    assert load_bundle(find_bundle("offline", tmp_path)).tasks
    assert list(tmp_path.iterdir()) == []


def test_results_say_that_they_are_not_core(tasks: tuple[CoreTask, ...]) -> None:
    results = [
        CoreTaskResult(
            label=task.label,
            task_type=task.task_type,
            examples=48,
            correct=24,
            random_baseline=0.0,
            seconds=1.0,
            num_fewshot=task.num_fewshot,
            prompt_tokens=100,
            tokens_run=50,
        )
        for task in tasks
    ]
    assert "not CORE" in describe(CoreResult(tuple(results)))[0]
    assert not is_offline([*results, replace(results[0], label="copa")])
