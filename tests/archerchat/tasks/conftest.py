"""A folder of local files in the hub's formats, a few rows of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from archerchat.tasks.hub import TaskFiles

GSM8K_ROWS = [
    {
        "question": "Ann has 3 bags of 4 nuts and eats 2. How many are left?",
        "answer": "She has 3*4=<<3*4=12>>12 nuts.\nShe keeps 12-2=<<12-2=10>>10.\n#### 10",
    },
    {
        "question": "Bob earns $500 twice a year. How much is it in a year?",
        "answer": "It is 2*500=$<<2*500=1000>>1,000.\n#### 1,000",
    },
    {"question": "What is half of seven?", "answer": "7/2=<<7/2=3.5>>3.5\n#### 3.5"},
]
MMLU_ROWS = [
    {"question": "1+1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "arithmetic"},
    {"question": "2*2?", "choices": ["1", "2", "3", "4"], "answer": 3, "subject": "arithmetic"},
]
ARC_ROWS = [
    {
        "question": "Which is a metal?",
        "choices": {"text": ["iron", "wood", "wool"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    },
    {
        "question": "Which is a gas?",
        "choices": {"text": ["iron", "air"], "label": ["1", "2"]},
        "answerKey": "2",
    },
]
HUMANEVAL_ROWS = [
    {
        "task_id": "HumanEval/0",
        "prompt": "from typing import List\nimport math\n\n\n"
        'def total(x: List[int]) -> int:\n    """Add.\n    from here\n    """\n',
        "canonical_solution": "    return sum(x)\n",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    math.pi\n",
        "entry_point": "total",
    }
]
SMOLTALK_ROWS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}]}
    for i in range(5)
]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def local_dir(tmp_path: Path) -> Path:
    """A folder for `--data-dir`."""
    folder = tmp_path / "local"
    for stem, rows in {
        "gsm8k/train": GSM8K_ROWS,
        "gsm8k/test": GSM8K_ROWS[:1],
        "mmlu/test": MMLU_ROWS,
        "mmlu/auxiliary_train": MMLU_ROWS[:1],
        "arc/ARC-Easy/test": ARC_ROWS,
        "arc/ARC-Challenge/test": ARC_ROWS[1:],
        "humaneval/HumanEval": HUMANEVAL_ROWS,
        "smoltalk/train": SMOLTALK_ROWS,
    }.items():
        write_lines(folder / f"{stem}.jsonl", rows)
    return folder


@pytest.fixture
def local_files(local_dir: Path, tmp_path: Path) -> TaskFiles:
    """The files of `local_dir`; nothing is fetched."""
    return TaskFiles(cache=tmp_path / "cache", local=local_dir)
