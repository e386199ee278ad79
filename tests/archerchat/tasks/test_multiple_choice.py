"""MMLU and ARC: the question as the specification writes it, the letter as the answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from archerchat.errors import DataError, UsageError
from archerchat.tasks.collected import ARCTask, MMLUTask, build_question
from archerchat.tasks.hub import TaskFiles


def test_multiple_choice_lists_each_choice_before_its_letter() -> None:
    question = build_question("Which is red?", ["A", "B"], ["grass", "blood"], "B")
    assert question["messages"][0]["content"] == (
        "Multiple Choice question: Which is red?\n- grass=A\n- blood=B\n"
        "\nRespond only with the letter of the correct answer."
    )
    with pytest.raises(DataError, match="1 letters for 2 choices"):
        build_question("Which is red?", ["A"], ["grass", "blood"], "A")
    with pytest.raises(DataError, match="answer 'C' is not one of A, B in the question 'Which"):
        build_question("Which is red?", ["A", "B"], ["grass", "blood"], "C")


def test_mmlu(local_files: TaskFiles) -> None:
    task = MMLUTask(local_files)
    assert (len(task), task.kind, task.random_baseline) == (2, "categorical", 0.25)
    question = (
        "Multiple Choice question: 1+1?\n- 1=A\n- 2=B\n- 3=C\n- 4=D\n"
        "\nRespond only with the letter of the correct answer."
    )
    assert task[0] == {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "B"},
        ],
        "letters": ("A", "B", "C", "D"),
        "subject": "arithmetic",
    }
    assert [task.evaluate(task[1], letter) for letter in "ABCD"] == [False, False, False, True]
    assert len(MMLUTask(local_files, "auxiliary_train")) == 1
    with pytest.raises(UsageError, match="no split 'train': choose from auxiliary_train, dev"):
        MMLUTask(local_files, "train")


def test_arc_keeps_the_data_s_letters(local_files: TaskFiles) -> None:
    easy, challenge = ARCTask(local_files, "ARC-Easy"), ARCTask(local_files, "ARC-Challenge")
    assert (easy.name, challenge.name) == ("ARC-Easy", "ARC-Challenge")
    assert [each["letters"] for each in easy] == [("A", "B", "C"), ("1", "2")]
    assert "- iron=1\n- air=2\n" in challenge[0]["messages"][0]["content"]
    assert easy.evaluate(easy[1], "2")
    assert not easy.evaluate(easy[0], "B")


def test_an_answer_beyond_the_choices_is_named(local_dir: Path, tmp_path: Path) -> None:
    row = '{"question": "?", "choices": ["a"], "answer": 1, "subject": "s"}\n'
    (local_dir / "mmlu" / "test.jsonl").write_text(row)
    task = MMLUTask(TaskFiles(tmp_path, local_dir))
    with pytest.raises(DataError, match="the answer '1' is not one of A in the question '\\?'"):
        task[0]


@pytest.mark.parametrize("name", ["ARC-Easy", "ARC-Challenge"])
def test_the_real_arc_reads_whole(name: str, shared_data_dir: Path, tmp_path: Path) -> None:
    files = TaskFiles(tmp_path, shared_data_dir)
    for task in (ARCTask(files, name, "train"), ARCTask(files, name, "test")):
        assert all(each["messages"][1]["content"] in each["letters"] for each in task)


def test_the_real_mmlu_reads_whole(shared_data_dir: Path, tmp_path: Path) -> None:
    task = MMLUTask(TaskFiles(tmp_path, shared_data_dir))
    assert len(task) == 14_042
    assert len({each["subject"] for each in task}) == 57
