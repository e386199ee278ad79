"""`archerchat models`: what is listed, renamed, removed and pruned, and what reports find then."""

from __future__ import annotations

import re
from typing import Any

import pytest

from archerchat.checkpoint import list_checkpoints
from archerchat.files import exclusive
from archerchat.report.runs import gather

SFT = (
    *("sft", "--device", "cpu", "--dtype", "float32", "--no-compile", "--eval-tokens", "512"),
    *("--mixture", "SimpleSpelling:60", "--num-iterations", "2", "--model-tag"),
)


def test_models_are_listed(trained_home: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert trained_home.run("models") == 0
    output = capsys.readouterr().out
    assert re.search(r"base +tiny +2, 4 +\d\.\d{4} +[\d.]+ [KM]i?B +\S+ (?:s|min) ago", output), (
        output
    )


def test_a_renamed_model_is_the_same_everywhere(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained_home.run(*SFT, "tiny") == 0
    chat = ("eval", "chat", "--tasks", "SpellingBee:2", "--max-new-tokens", "2", "--device", "cpu")
    assert trained_home.run(*chat) == 0
    assert (
        "step_000002 (the model saved last; --model-tag names another)" in capsys.readouterr().err
    )
    assert trained_home.run("models", "rename", "tiny", "first") == 0
    assert trained_home.run("models", "rename", "first", "ada") == 0
    assert not trained_home.checkpoint_dir("base", "tiny").exists()
    runs, results = gather(trained_home, "ada")
    assert [(run.stage, run.model_tag) for run in runs] == [("base", "ada"), ("sft", "ada")]
    assert [(result.stage, result.tag) for result in results] == [("sft", "ada")]
    assert trained_home.run(*SFT, "ada") == 0  # it is not refused as one of another base model
    assert list_checkpoints(trained_home.checkpoint_dir("sft", "ada")) == [2]


def test_a_run_after_the_renaming_is_another_model(trained_home: Any) -> None:
    assert trained_home.run("models", "rename", "tiny", "old") == 0
    assert trained_home.pretrain() == 0  # a new model of the old name
    runs, _ = gather(trained_home, "tiny")
    assert [run.model_tag for run in runs] == ["tiny"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rename", "tiny", "tiny"), "exists: choose another name"),
        (("rename", "gone", "new"), "no model 'gone'"),
        (("rename", "tiny", "../new"), "cannot be a directory's name"),
        (("remove", "tiny"), "would be deleted: confirm it by --yes"),
        (("remove", "tiny", "--stage", "rl", "--yes"), "no rl model 'tiny'"),
        (("prune", "tiny", "--keep-last", "0"), "--keep-last is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_done_changes_nothing(
    trained_home: Any, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert trained_home.run("models", *words) == 2
    assert message in capsys.readouterr().err
    assert trained_home.steps() == [2, 4]


def test_pruning_and_removing(trained_home: Any) -> None:
    assert trained_home.run("models", "prune", "tiny") == 0
    assert trained_home.steps() == [4]
    with exclusive(trained_home.checkpoint_dir("base", "tiny")):
        assert trained_home.run("models", "remove", "tiny", "--yes") == 2
    assert trained_home.steps() == [4]
    assert trained_home.run("models", "remove", "tiny", "--yes") == 0
    assert not trained_home.checkpoint_dir("base", "tiny").exists()
