"""GSM8K: marks become tool calls, and the number after `####` decides."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from archerchat.tasks.base import find_number, find_number_leniently
from archerchat.tasks.collected import GSM8KTask, parse_answer
from archerchat.tasks.conversation import part
from archerchat.tasks.hub import TaskFiles


def test_marks_become_python_and_its_output(local_files: TaskFiles) -> None:
    task = GSM8KTask(local_files, "train")
    question, answer = task[0]["messages"]
    assert question["content"].startswith("Ann has 3 bags")
    assert answer["content"] == [
        part("text", "She has 3*4="),
        part("python", "3*4"),
        part("python_output", "12"),
        part("text", "12 nuts.\nShe keeps 12-2="),
        part("python", "12-2"),
        part("python_output", "10"),
        part("text", "10.\n#### 10"),
    ]


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ("no mark", [part("text", "no mark")]),
        ("<<1=1>>", [part("python", "1"), part("python_output", "1")]),
        ("a<<5>>b", [part("text", "a"), part("text", "5"), part("text", "b")]),
        ("<<>>", []),
        ("a<<1=1", [part("text", "a<<1=1")]),
        ("<<a=b=c>>", [part("python", "a=b"), part("python_output", "c")]),
    ],
)
def test_odd_marks(answer: str, parts: list[dict[str, str]]) -> None:
    assert parse_answer(answer) == parts


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### -5", "-5"),
        ("####7", "7"),
        ("#### 3.50 dollars", "3.50"),
        ("#### 18.", "18"),
        ("#### .5", ".5"),
        ("#### 1\n#### 2", "1"),
        ("#### none, but #### 4", "4"),
        ("18", None),
        ("#### eighteen", None),
        ("", None),
    ],
)
def test_the_number_after_the_marks(text: str, number: str | None) -> None:
    assert find_number(text) == number


def test_the_number_decides(local_files: TaskFiles) -> None:
    task = GSM8KTask(local_files, "train")
    assert task.kind == "generative"
    assert task.evaluate(task[0], "Ten.\n#### 10")
    assert task.evaluate(task[1], "#### 1000")
    assert not task.evaluate(task[0], "#### 11")
    assert not task.evaluate(task[0], "10")
    assert task.reward(task[2], "#### 3.5") == 1.0
    assert task.reward(task[2], "#### 3") == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 29.00", "29"),
        ("#### - 3", "-3"),
        ("#### \u22123", "-3"),
        ("#### **29**", "29"),
        ("#### $1,029.50.", "1029.5"),
        ("#### -$.5", "-0.5"),
        ("####\n29 apples, 3 each", "29"),
        ("5 - 3 = **2**", "2"),
        ("It is 10 - 3", "3"),
        ("It is 10-3", "3"),
        ("It is 2 (or -2)", "-2"),
        ("7 are left. #### none", "7"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_lenient_number(text: str, number: str | None) -> None:
    assert find_number_leniently(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize("form", ["10.00", "**10**", "$10", " 10 nuts"])
def test_the_lenient_rule_forgives_the_form_and_no_other_number(
    local_files: TaskFiles, form: str
) -> None:
    task = GSM8KTask(local_files, "train")
    assert task.is_lenient
    assert task.evaluate_leniently(task[0], f"12 - 2 is it.\n#### {form}")
    assert task.evaluate_leniently(task[0], f"She keeps {form}")
    assert not task.evaluate(task[0], f"She keeps {form}")
    assert not task.evaluate_leniently(task[1], f"#### {form}")
    assert not task.evaluate_leniently(task[0], f"#### 1{form.strip()}1")
    assert not task.evaluate_leniently(task[0], f"#### -{form.strip()}")


def test_the_real_answers_pass_their_own_test(shared_data_dir: Path, tmp_path: Path) -> None:
    for split, size in (("train", 7473), ("test", 1019)):
        task = GSM8KTask(TaskFiles(tmp_path, shared_data_dir), split)
        assert len(task) == size
        for conversation in task:
            parts = conversation["messages"][1]["content"]
            text = "".join(each["text"] for each in parts if each["type"] == "text")
            assert "<<" not in text
            assert task.evaluate(conversation, text)
