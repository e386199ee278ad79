"""Conversations from JSON lines: all checked on reading, each error with its line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from archerchat.cli import main
from archerchat.errors import DataError, UsageError
from archerchat.tasks.base import Task
from archerchat.tasks.collected import JsonlTask
from archerchat.tasks.conversation import assistant, part, user
from archerchat.tasks.hub import TaskFiles
from archerchat.tasks.registry import MixtureConfig, build_mixtures

GOOD = [user("Hi"), assistant("Hello")]


def write(path: Path, *values: Any) -> Path:
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_both_forms_of_a_line_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "talks.jsonl", GOOD, "", {"messages": GOOD, "id": 7})
    task: Task = JsonlTask(path)
    assert task.name == "talks.jsonl"
    assert list(task) == [{"messages": GOOD}, {"messages": GOOD, "id": 7}]


def test_a_folder_keeps_its_splits_and_names_what_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GOOD, GOOD)
    (tmp_path / "valid.json").write_text(json.dumps([GOOD]))
    (tmp_path / "README.md").touch()
    train = JsonlTask(tmp_path, "train")
    assert (len(train), train.split) == (2, "train")
    assert train.left_out == ["README.md (.md, which is not read)"]
    assert (len(JsonlTask(tmp_path, "validation")), len(JsonlTask(tmp_path))) == (1, 3)
    config = MixtureConfig(mixture="Arithmetic:9", jsonl=(tmp_path,))
    mixtures = build_mixtures(config, TaskFiles(tmp_path))
    assert [task.name for task in mixtures[0].tasks] == ["Arithmetic", tmp_path.name]
    assert [(t.name, t.split) for t in mixtures[1].tasks] == [
        (tmp_path.name, "validation"),
        ("Arithmetic", "test"),
    ]


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in "ba":
        write(tmp_path / f"{name}.jsonl", [user(name), assistant(name)])
    (tmp_path / "notes.txt").write_text("not read")
    assert [each["messages"][0]["content"] for each in JsonlTask(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "not JSON"),
        ([assistant("Hello"), user("Hi")], "role is 'assistant' where 'user'"),
        ([user("Hi"), assistant("")], "content is empty"),
        ([user("Hi"), assistant([{"type": "video", "text": ""}])], "not {'type': 'video'"),
        ({"text": "Hi"}, "a conversation is"),
    ],
)
def test_a_broken_line_is_named_by_number(line: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "talks.jsonl", GOOD, GOOD, "", line, GOOD)
    with pytest.raises(DataError, match=rf"talks\.jsonl:4\b.*{message}"):
        JsonlTask(path)


def test_bad_lines_are_left_out_on_request_and_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "talks.jsonl", GOOD, "{", {"messages": [assistant("Hi")]}, GOOD)
    task = JsonlTask(path, skip_bad=True)
    assert len(task) == 2
    summary, *named = task.left_out
    assert summary == "2 bad lines were left out, the first:"
    assert [f"talks.jsonl:{line}" in text for line, text in zip((2, 3), named, strict=True)]
    config = MixtureConfig(mixture="none", jsonl=(path,), skip_bad=True)
    train, _ = build_mixtures(config, TaskFiles(tmp_path))
    assert len(train) == 2
    with pytest.raises(DataError):
        JsonlTask(path)


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no conversation"):
        JsonlTask(tmp_path)
    with pytest.raises(DataError, match="holds no conversation"):
        JsonlTask(write(tmp_path / "empty.jsonl"))
    with pytest.raises(UsageError, match=r"none\.jsonl does not exist: give a file or a folder"):
        JsonlTask(tmp_path / "none.jsonl")


def test_another_content_is_another_identity(tmp_path: Path) -> None:
    path = write(tmp_path / "talks.jsonl", GOOD)
    first = JsonlTask(path).describe()
    assert first == JsonlTask(path).describe()
    write(path, [user("Hi"), assistant("Hallo")])
    assert JsonlTask(path).describe() != first


def test_the_real_conversations_all_pass(shared_data_dir: Path) -> None:
    assert len(JsonlTask(shared_data_dir / "chat" / "oasst1_validation_en.jsonl")) == 419
    assert len(JsonlTask(shared_data_dir / "chat" / "fastchat_identity.jsonl")) == 492


@pytest.mark.slow
def test_the_whole_folder_of_real_conversations_passes(shared_data_dir: Path) -> None:
    assert len(JsonlTask(shared_data_dir / "chat")) == 28_832


SYSTEM = {"role": "system", "content": "Be brief."}
LINES = {
    "OpenAI": {"messages": [SYSTEM, *GOOD]},
    "ShareGPT": {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
    },
    "Alpaca": {"instruction": "Hi", "input": "", "output": "Hello", "system": "Be brief."},
}


def test_layouts_of_other_tools_are_read_and_named(tmp_path: Path) -> None:
    task = JsonlTask(write(tmp_path / "talks.jsonl", *LINES.values()))
    assert [each["messages"] for each in task] == [[SYSTEM, *GOOD]] * 3
    counts = "1 in OpenAI layout, 1 in ShareGPT layout, 1 in Alpaca layout"
    assert task.found == [f"{tmp_path / 'talks.jsonl'}: {counts}"]
    turns = {"instruction": "Add", "input": "1, 2", "output": "3", "history": [["Hi", "Hello"]]}
    (only,) = JsonlTask(write(tmp_path / "turns.jsonl", turns))
    assert only["messages"] == [*GOOD, user("Add\n\n1, 2"), assistant("3")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"conversations": [{"from": "human", "text": "Hi"}]}, 'turn 0 must be {"from"'),
        ({"conversations": 7}, "turn 0 must be"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "'observation'"),
        ({"instruction": ["Hi"], "output": "Hello"}, "are text"),
        ({"instruction": "Hi"}, "content is empty"),
        ({"instruction": "Hi", "output": "Hello", "history": 5}, "history pairs"),
        (
            {"conversations": [{"from": "human", "value": "Hi", "weight": 0}]},
            "messages of weight 0",
        ),
    ],
)
def test_bad_lines_of_other_layouts_are_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"talks\.jsonl:1: .*{re.escape(message)}"):
        JsonlTask(write(tmp_path / "talks.jsonl", line))


@pytest.mark.parametrize("layout", ["openai", "sharegpt", "alpaca"])
def test_an_exported_layout_is_read_again(tmp_path: Path, layout: str) -> None:
    source = write(
        tmp_path / "talks.jsonl", {"messages": [SYSTEM, *GOOD, user("a"), assistant("b")]}
    )
    words = ["export", "conversations", str(source), str(tmp_path / "out.jsonl")]
    assert main([*words, "--layout", layout]) == 0
    (again,) = JsonlTask(tmp_path / "out.jsonl")
    assert again["messages"] == JsonlTask(source)[0]["messages"]
    assert main([*words, "--layout", layout]) == 2


def test_exported_calculations_are_kept_or_marked(tmp_path: Path, capsys: Any) -> None:
    parts = [part("python", "2*3"), part("python_output", "6")]
    source = write(tmp_path / "sums.jsonl", [user("2 times 3?"), assistant(parts)])
    expected = {"openai": parts, "sharegpt": "<<2*3=6>>", "alpaca": "<<2*3=6>>"}
    for layout, content in expected.items():
        file = tmp_path / f"{layout}.jsonl"
        words = ["export", "conversations", str(source), str(file), "--layout", layout]
        assert main(words) == 0
        (again,) = JsonlTask(file)
        assert again["messages"][-1]["content"] == content
    write(source, [user("2 times 3?"), assistant(parts), user("And 4?")])
    (tmp_path / "alpaca.jsonl").unlink()
    assert main(words) == 2
    assert "no answer follows 'And 4?'" in capsys.readouterr().err
