"""Generated tasks: right, reproducible, and without a question that is in both splits."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from archerchat.errors import UsageError
from archerchat.inference.calculator import evaluate
from archerchat.tasks.conversation import Conversation, check_conversation, text_of
from archerchat.tasks.generated import (
    ArithmeticTask,
    GeneratedTask,
    SimpleSpellingTask,
    SpellingBeeTask,
    load_questions,
    load_words,
    split_of,
)

TASKS: list[type[GeneratedTask]] = [SpellingBeeTask, SimpleSpellingTask, ArithmeticTask]
every_task = pytest.mark.parametrize("make", TASKS)


def answer(conversation: Conversation) -> str:
    return text_of(conversation["messages"][-1]["content"])


@every_task
def test_an_example_depends_on_split_and_index_alone(make: type[GeneratedTask]) -> None:
    task = make("train", 100)
    assert [task[i] for i in (7, 3)] == [make("train", 50)[i] for i in (7, 3)]
    assert task[7] != task[8]
    assert task[7] != make("test", 100)[7]


@every_task
def test_another_process_draws_the_same(make: type[GeneratedTask]) -> None:
    program = (
        f"import json; from {make.__module__} import {make.__name__}; "
        f"print(json.dumps({make.__name__}('test', 5)[:][4]))"
    )
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert json.loads(output) == make("test", 5)[4]


@every_task
def test_conversations_are_sound_and_right_by_their_own_judgement(
    make: type[GeneratedTask],
) -> None:
    for split in ("train", "test"):
        task = make(split, 300)
        assert task.kind == "generative"
        for conversation in task:
            check_conversation(conversation)
            assert task.evaluate(conversation, answer(conversation))
            assert task.reward(conversation, "I do not know") == 0.0


@pytest.mark.parametrize("make", [SpellingBeeTask, ArithmeticTask])
def test_the_calculator_finds_the_output_that_is_taught(make: type[GeneratedTask]) -> None:
    """The task computes in plain Python what the engine's calculator will say later."""
    for conversation in make("train", 300):
        parts = conversation["messages"][1]["content"]
        (python,) = [each["text"] for each in parts if each["type"] == "python"]
        (output,) = [each["text"] for each in parts if each["type"] == "python_output"]
        assert evaluate(python) == output
        assert answer(conversation).endswith(f"#### {output}")


def test_counts_are_right_and_often_not_zero() -> None:
    task, counts = SpellingBeeTask("train", 500), []
    for conversation in task:
        python = conversation["messages"][1]["content"][1]["text"]
        match = re.fullmatch(r"'([a-z]+)'\.count\('([a-z])'\)", python)
        assert match is not None
        word, letter = match.groups()
        assert word in conversation["messages"][0]["content"]
        count = sum(each == letter for each in word)
        counts.append(count)
        assert not task.evaluate(conversation, f"#### {count + 1}")
        by_hand = conversation["messages"][1]["content"][0]["text"]
        lines = re.findall(r"^\d+\. ([a-z])(?: yes, (\d+))?$", by_hand, re.MULTILINE)
        assert "".join(each for each, _ in lines) == word
        assert [int(number) for _, number in lines if number] == list(range(1, count + 1))
    assert counts.count(0) < 100
    assert max(counts) >= 3


def test_spelling_is_right() -> None:
    task = SimpleSpellingTask("test", 100)
    for conversation in task:
        word, _, letters = answer(conversation).partition(": ")
        assert letters.split(",") == list(word)
        assert word in conversation["messages"][0]["content"]
        assert not task.evaluate(conversation, f"{word}: {letters},x")
        assert task.evaluate(conversation, f" {word}: {letters}\n")


def test_questions_come_in_many_forms() -> None:
    questions = [each["messages"][0]["content"] for each in SpellingBeeTask("train", 2000)]
    assert any(question.startswith("How many") for question in questions)
    assert any(question.startswith("how many") for question in questions)
    assert any('"' in question for question in questions)
    assert any("'" in question for question in questions)
    assert any(question.endswith("?") for question in questions)
    assert any(question[-1].isalpha() for question in questions)
    for start in ("Wie viele", "Combien de", "¿Cuántas", "Сколько букв"):
        assert any(question.startswith(start) for question in questions), start
    templates = load_questions("count")
    assert len(set(templates)) == len(templates)
    for template in templates:
        assert "{word}" in template
        assert "{letter}" in template


def subjects(split: str) -> set[str]:
    return {answer(each).split(":")[0] for each in SimpleSpellingTask(split, 3000)}


def test_no_word_is_in_both_splits() -> None:
    train, test = set(load_words("train")), set(load_words("test"))
    assert not train & test
    assert len(train) > 5000
    assert len(test) > 500
    assert subjects("train") <= train
    assert subjects("test") <= test


def test_no_sum_is_in_both_splits() -> None:
    problems = {
        split: {
            conversation["messages"][1]["content"][1]["text"]
            for conversation in ArithmeticTask(split, 2000)
        }
        for split in ("train", "test")
    }
    assert not problems["train"] & problems["test"]
    assert len(problems["test"]) > 20
    longest = max(len(number) for each in problems["train"] for number in re.findall(r"\d+", each))
    assert longest == 2


def test_words_are_kept_in_order_and_plain() -> None:
    words = sorted(load_words("train") + load_words("test"))
    assert len(set(words)) == len(words)
    assert all(re.fullmatch(r"[a-z]{3,15}", word) for word in words)
    assert {split_of(word) for word in load_words("test")} == {"test"}


def test_an_impossible_split_is_refused() -> None:
    with pytest.raises(UsageError, match="no split 'dev' of a generated task: use train or test"):
        SpellingBeeTask("dev")


def test_descriptions_tell_generated_tasks_apart() -> None:
    tasks: list[GeneratedTask] = [
        ArithmeticTask("train", 10),
        ArithmeticTask("train", 11),
        ArithmeticTask("test", 10),
        SpellingBeeTask("train", 10),
    ]
    assert len({str(task.describe()) for task in tasks}) == len(tasks)
