"""Bundles: what is read, and what is refused by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from archerchat.errors import DataError
from archerchat.evals.core.bundle import Example, load_bundle, read_examples


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_tasks_and_examples(small_bundle: Path) -> None:
    bundle = load_bundle(small_bundle)
    choice, schema, text = bundle.tasks
    assert [task.task_type for task in bundle.tasks] == [task.label for task in bundle.tasks]
    assert (choice.num_fewshot, schema.num_fewshot, text.num_fewshot) == (0, 1, 2)
    assert choice.delimiter == " "
    assert choice.random_baseline == pytest.approx(1 / 3)
    assert (schema.random_baseline, text.random_baseline) == (0.5, 0.0)
    assert len(read_examples(schema)) == 12
    assert all(len(example.questions) == 2 for example in read_examples(schema))
    assert all(len(example.answers) == 3 for example in read_examples(choice))
    assert isinstance(read_examples(text)[0], Example)


def test_the_fingerprint_changes_with_all_that_decides_outcomes(small_bundle: Path) -> None:
    first = load_bundle(small_bundle).fingerprint()
    assert load_bundle(small_bundle).fingerprint() == first
    replace(small_bundle / "core.yaml", "[2]", "[3]")
    second = load_bundle(small_bundle).fingerprint()
    path = small_bundle / "eval_data" / "schema.jsonl"
    path.write_text(path.read_text() + "\n")
    assert len({first, second, load_bundle(small_bundle).fingerprint()}) == 3


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("core.yaml", "icl_tasks:", "tasks:", "has no list `icl_tasks`"),
        ("core.yaml", "icl_tasks:", "icl_tasks: [", "core.yaml is not YAML"),
        (
            "core.yaml",
            "icl_task_type: schema",
            "icl_task_type: essay",
            "'schema' is of type 'essay'",
        ),
        (
            "core.yaml",
            "icl_task_type: schema",
            "icl_task_type: [schema]",
            "'schema' is of type ['schema']",
        ),
        ("core.yaml", "label: schema", "name: schema", "has a task without a `label`"),
        ("core.yaml", "label: schema", "label: multiple_choice", "has two tasks 'multiple_choice'"),
        ("core.yaml", "uri: schema.jsonl", "uri: gone.jsonl", "lacks the files of schema"),
        ("core.yaml", "uri: schema.jsonl", "uri: ../../x", "which is not one under eval_data"),
        ("core.yaml", "[2]", "[2, 3]", "has num_fewshot [2, 3]"),
        ("core.yaml", "[2]", "-1", "has num_fewshot -1"),
        ("core.yaml", "num_fewshot: [2]", "continuation_delimiter: 3", "has num_fewshot None"),
        ("eval_meta_data.csv", "schema,", "other,", "'schema' has no line in eval_meta_data.csv"),
        ("eval_meta_data.csv", "Random baseline", "baseline", "must have the columns"),
        ("eval_meta_data.csv", "schema,50", "schema,half", "schema has the baseline 'half'"),
        ("eval_meta_data.csv", "schema,50", "schema,100", "it must be under 100"),
    ],
)
def test_a_broken_list_is_refused(
    small_bundle: Path, file: str, old: str, new: str, message: str
) -> None:
    replace(small_bundle / file, old, new)
    with pytest.raises(DataError) as error:
        load_bundle(small_bundle)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["core.yaml", "eval_meta_data.csv"])
def test_a_missing_list_is_named(small_bundle: Path, name: str) -> None:
    (small_bundle / name).unlink()
    with pytest.raises(DataError, match=f"cannot read .*{name}.*get the whole bundle again"):
        load_bundle(small_bundle)


@pytest.mark.parametrize(
    ("kind", "line", "reason"),
    [
        ("schema", "{", "Expecting property name"),
        ("schema", '{"continuation": "x", "gold": 0}', "it lacks 'context_options'"),
        ("schema", '{"context_options": ["a"], "continuation": "x", "gold": 0}', "at least two"),
        ("multiple_choice", '{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold is 2"),
        (
            "multiple_choice",
            '{"query": "a", "choices": ["b", 3], "gold": 0}',
            "choices has 3, which is no text",
        ),
        ("language_modeling", '{"context": 1, "continuation": "x"}', "context has 1, which"),
        ("language_modeling", "[]", "list indices"),
    ],
)
def test_a_broken_line_is_named(small_bundle: Path, kind: str, line: str, reason: str) -> None:
    path = small_bundle / "eval_data" / f"{kind}.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[:3], "", line, *rows[3:]]))
    task = next(task for task in load_bundle(small_bundle).tasks if task.label == kind)
    with pytest.raises(DataError) as error:
        read_examples(task)
    assert str(error.value).startswith(f"{path}:5")
    assert reason in str(error.value)


def test_an_empty_task_is_named(small_bundle: Path) -> None:
    path = small_bundle / "eval_data" / "schema.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match=r"task schema: .*schema.jsonl holds no example"):
        read_examples(load_bundle(small_bundle).tasks[1])


def test_a_file_that_is_no_text_is_named(small_bundle: Path) -> None:
    path = small_bundle / "eval_data" / "schema.jsonl"
    path.write_bytes(b"\n\xff")
    with pytest.raises(DataError, match=r"schema.jsonl:2: not UTF-8 text.*get the whole bundle"):
        read_examples(load_bundle(small_bundle).tasks[1])
