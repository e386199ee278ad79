"""HumanEval: the program that is run, and that the known solutions pass it."""

from __future__ import annotations

from pathlib import Path

import pytest

from archerchat.tasks.hub import TaskFiles
from archerchat.tasks.humaneval import (
    HumanEvalTask,
    extract_code,
    extract_code_leniently,
    extract_imports,
)

RIGHT = "def total(x):\n    return sum(x)"


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("```py\nx = 1\n```", "x = 1"),
        ("```Python \r\nx = 1\n```", "x = 1"),
        ("Sure:\n```python\nx = 1\n```\nThat is it.", "x = 1"),
        ("```python\nx = 1\n```\n```python\nx = 2\n```", "x = 1"),
        ("\n    return 1\n", "    return 1"),
        ("```python\nx = 1", "```python\nx = 1"),
        ("", ""),
    ],
)
def test_the_first_fenced_block_is_the_code(completion: str, code: str) -> None:
    assert extract_code(completion) == code


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("x = 1", "x = 1"),
        (f"```python3\n{RIGHT}\n```", RIGHT),
        (f"```python\n{RIGHT}", RIGHT),
        (f"Run it:\n```bash\npython it.py\n```\nand\n```python\n{RIGHT}\n```\nDone.", RIGHT),
        (f"```bash\npython it.py\n```python\n{RIGHT}\n```", RIGHT),
        (f"```python\ntotals = []\n```\n```python\n{RIGHT}\n```", RIGHT),
        (f"```python\n{RIGHT}\n```\n```python\ntotal([1])\n```", RIGHT),
        (f"1. Add:\n   ```py\n{RIGHT}\n   ```", RIGHT),
        (f"````\n{RIGHT}\n````", RIGHT),
        ("```python\nx = 1\n```\n```\ny = 2\n```", "x = 1"),
        ("```python\n```", ""),
        ("Use ``` for code", "Use ``` for code"),
        ("", ""),
    ],
)
def test_the_lenient_code_is_the_block_that_defines_the_function(
    completion: str, code: str
) -> None:
    assert extract_code_leniently(completion, "total") == code


def test_only_the_head_s_imports_are_taken() -> None:
    prompt = "import math\nfrom typing import List\n\n\ndef f():\n    '''\nimport os\n    '''\n"
    assert extract_imports(prompt) == "import math\nfrom typing import List"
    assert extract_imports("def f(): pass") == ""


def test_answers_are_judged_by_running(local_files: TaskFiles) -> None:
    task = HumanEvalTask(local_files)
    (conversation,) = task
    assert task.kind == "generative"
    assert task.evaluate(conversation, conversation["messages"][1]["content"])
    assert task.evaluate(conversation, RIGHT)
    assert task.evaluate(conversation, f"Here:\n```python\n{RIGHT}\n```\nIt adds.")
    assert task.reward(conversation, RIGHT) == 1.0
    for wrong in (
        "",
        "def total(x):\n    return 0",
        "def total(x):\n    return",
        "I do not know.",
        f"{RIGHT}\nimport sys\nsys.exit()",
        f"{RIGHT}\nimport os\nos._exit(0)",
        "def total(x):\n    exit()",
        "```python\n```",
    ):
        assert not task.evaluate(conversation, wrong), wrong


@pytest.mark.parametrize(
    "answer",
    [
        f"```bash\npython it.py\n```\nNow:\n```python\n{RIGHT}\n```",
        f"```python3\n{RIGHT}\n```",
        f"```python\n{RIGHT}",
    ],
)
def test_the_lenient_rule_finds_what_the_reference_s_loses(
    local_files: TaskFiles, answer: str
) -> None:
    task = HumanEvalTask(local_files)
    (conversation,) = task
    assert task.is_lenient
    assert not task.evaluate(conversation, answer)
    assert task.evaluate_leniently(conversation, answer)
    assert not task.evaluate_leniently(conversation, answer.replace("sum(x)", "0"))


def test_an_answer_that_does_not_end_is_stopped(local_files: TaskFiles) -> None:
    task = HumanEvalTask(local_files)
    task.timeout_s = 0.3
    result = task.run(task[0], "def total(x):\n    while True: pass")
    assert result.outcome == "timeout"


def real(shared_data_dir: Path, tmp_path: Path) -> HumanEvalTask:
    task = HumanEvalTask(TaskFiles(tmp_path, shared_data_dir))
    task.timeout_s = 30
    return task


def failures(task: HumanEvalTask) -> list[tuple[str, str]]:
    answers = [(each, each["messages"][1]["content"]) for each in task]
    results = [
        (each["entry_point"], task.run(each, extract_code(answer))) for each, answer in answers
    ]
    return [(name, result.stderr) for name, result in results if result.outcome != "completed"]


def test_known_solutions_pass(shared_data_dir: Path, tmp_path: Path) -> None:
    task = real(shared_data_dir, tmp_path)
    assert len(task) == 164
    assert failures(task[::40]) == []


@pytest.mark.slow
def test_all_known_solutions_pass(shared_data_dir: Path, tmp_path: Path) -> None:
    assert failures(real(shared_data_dir, tmp_path)) == []


def test_an_empty_body_passes_no_real_problem(shared_data_dir: Path, tmp_path: Path) -> None:
    task = real(shared_data_dir, tmp_path)[::40]
    for conversation in task:
        prompt = conversation["messages"][0]["content"]
        assert not task.evaluate(conversation, f"{prompt}    return None\n")
