"""Runs are tagged, noted, grouped, renamed, archived and deleted; rules of alerts are kept."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest


def test_runs_are_changed_many_at_once(
    cli: Any, train: Any, online: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directories = [train(f"edit-{n}", project="edited") for n in range(2)]
    assert cli("sync", *directories)[0] == 0
    ids = cli("ls", "--ids", "project:edited")[1].split()
    assert len(ids) == 2

    def shown(key: str) -> list[Any]:
        return [json.loads(cli("show", run, "--json")[1])[key] for run in ids]

    assert cli("tag", *ids, "--add", "a", "--add", "b")[1] == "2 runs tagged\n"
    assert cli("tag", ids[0], "--remove", "a")[0] == 0
    assert shown("tags") == [["b"], ["a", "b"]]
    monkeypatch.setattr("sys.stdin", io.StringIO("first try"))
    assert cli("note", ids[0], "-")[1] == "1 run changed: notes = 'first try'\n"
    assert cli("group", *ids, "--name", "sweep")[0] == 0
    assert cli("group", ids[1], "--name", "")[0] == 0
    assert shown("group") == ["sweep", None]
    assert cli("group", *ids, "--name", "sweep")[0] == 0
    assert cli("rename", "edited/edit-1", "renamed")[0] == 0
    assert (shown("notes"), shown("group")) == (["first try", None], ["sweep"] * 2)
    assert "renamed" in shown("name")
    assert cli("archive", *ids)[0] == 0
    assert cli("ls", "project:edited")[1] == "no runs\n"
    assert cli("archive", *ids, "--undo")[0] == 0
    assert cli("delete", ids[0])[0] == 2
    assert cli("delete", ids[0], "--yes")[0] == 0
    assert cli("ls", "--ids", "project:edited")[1].split() == [ids[1]]
    assert cli("delete", ids[0], "--undo")[0] == 0
    assert cli("tag", ids[0])[0] == 2


class Terminal(io.StringIO):
    """What a person types: a line, or Ctrl-C or Ctrl-D."""

    def isatty(self) -> bool:
        return True


class Interrupted(Terminal):
    """A key is pressed before a line is there."""

    def __init__(self, key: type[BaseException]) -> None:
        super().__init__()
        self.key = key

    def read(self, size: int | None = -1, /) -> str:
        raise self.key

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        raise self.key


@pytest.mark.parametrize(
    ("words", "key"),
    [(["note", "-"], KeyboardInterrupt), (["delete"], KeyboardInterrupt), (["delete"], EOFError)],
)
def test_a_key_at_a_question_ends_the_command(
    cli: Any, train: Any, online: str, monkeypatch: Any, words: list[str], key: Any
) -> None:
    assert cli("sync", train("asked", project="asked"))[0] == 0
    (run, *_) = cli("ls", "--ids", "project:asked")[1].split()
    monkeypatch.setattr("sys.stdin", Interrupted(key))
    status, _, err = cli(words[0], run, *words[1:])
    assert (status, err) == (130, "\nendlex: interrupted\n")


@pytest.mark.parametrize(("answer", "status"), [("n\n", 1), ("\n", 1), ("yes\n", 0)])
def test_runs_are_deleted_if_the_answer_is_yes(
    cli: Any, train: Any, online: str, monkeypatch: Any, answer: str, status: int
) -> None:
    project = f"answer-{answer.strip()}"
    assert cli("sync", train("answered", project=project))[0] == 0
    (run,) = cli("ls", "--ids", f"project:{project}")[1].split()
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    found, _, err = cli("delete", run)
    assert (found, err) == (status, "endlex: nothing was deleted\n" if status else "")
    assert bool(cli("ls", "--ids", f"project:{project}")[1].split()) == bool(status)


def test_notes_that_are_no_text_are_refused(
    cli: Any, train: Any, online: str, monkeypatch: Any
) -> None:
    assert cli("sync", train("noted", project="noted"))[0] == 0
    (run, *_) = cli("ls", "--ids", "project:noted")[1].split()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    status, _, err = cli("note", run, "-")
    assert (status, "can't decode byte 0xe9" in err) == (1, True)


def test_an_unknown_metric_says_what_was_meant(cli: Any, train: Any, online: str) -> None:
    assert cli("sync", train("one", project="meant"))[0] == 0
    status, _, err = cli("ls", "val/bbp<1")
    assert (status, "did you mean val/bpb?" in err) == (1, True)


@pytest.mark.parametrize("rule", ["word", "a > 1 b > 2", "a > b"])
def test_rules_are_kept_by_project(cli: Any, online: str, rule: str) -> None:
    assert cli("alert", "add", rule)[0] in (1, 2)
    assert cli("alert", "add", "val/bpb > 2", "--project", "p", "--minutes", 5)[0] == 0
    assert "val/bpb > 2  5.0      warning" in cli("alert", "ls", "--project", "p")[1]
    assert cli("alert", "remove", "val/bpb > 2", "--project", "p")[0] == 0
    assert "no rules" in cli("alert", "ls", "--project", "p")[1]
