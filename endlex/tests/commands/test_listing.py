"""`endlex ls`, `show` and `compare`, of a server and of directories here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import endlex
from endlex.client.directories import read_run_file


def run_of(directory: Path) -> str:
    owner = read_run_file(directory)
    assert owner is not None
    return owner["run"]


def test_ls_finds_by_project_text_and_metric(cli: Any, train: Any, online: str) -> None:
    good, bad = train("good", 8, "listed"), train("bad", 1, "listed")
    assert cli("sync", good, bad)[0] == 0
    status, out, _ = cli("ls", "--project", "listed")
    assert status == 0
    assert run_of(good) in out
    assert run_of(bad) in out
    assert "val/bpb" in out.splitlines()[0]
    _, out, _ = cli("ls", "project:listed", "val/bpb<0.9")
    assert run_of(good) in out
    assert run_of(bad) not in out
    page = json.loads(cli("ls", "--project", "listed", "--limit", 1, "--json")[1])
    assert (len(page["runs"]), page["total"]) == (1, 2)
    assert "1 of 2 runs: --limit shows more" in cli("ls", "--project", "listed", "--limit", 1)[1]
    assert cli("ls", "--project", "none-such")[1] == "no runs\n"


@pytest.mark.parametrize("sort", [["--sort", "-val/bpb"], ["--sort=-val/bpb"]])
def test_ls_sorts_downwards(cli: Any, train: Any, online: str, sort: list[str]) -> None:
    low, high = train("low", 8, f"sorted{len(sort)}"), train("high", 1, f"sorted{len(sort)}")
    assert cli("sync", low, high)[0] == 0
    listed = json.loads(cli("ls", "--project", f"sorted{len(sort)}", *sort, "--json")[1])["runs"]
    assert [run["name"] for run in listed] == ["high", "low"]


def test_ls_local_needs_no_server(cli: Any, train: Any) -> None:
    directory = train("here")
    assert cli("ls", "--local")[0] == 0
    (run,) = json.loads(cli("ls", "--local", "--json")[1])
    assert (run["run"], run["status"], run["name"]) == (run_of(directory), "finished", "here")
    assert run["summary"] == {"train/loss": 0.6, "val/bpb": 0.6}
    assert run_of(directory) in cli("ls", "--local", "here", "val/bpb < 0.7", "--ids")[1]
    assert cli("ls", "--local", "-here", "--ids")[1] == ""
    assert cli("ls", "--local", "val/bpb <")[0] == 2
    assert "min:val/bpb" in cli("ls", "--help")[1]


def test_show_says_the_same_of_a_directory_and_of_the_server(
    cli: Any, train: Any, online: str
) -> None:
    directory = train(save=b"weights", config={"depth": 12, "optim": {"lr": 0.02}}, notes="a note")
    assert cli("sync", directory)[0] == 0
    here = json.loads(cli("show", directory, "--json")[1])
    there = json.loads(cli("show", run_of(directory), "--json")[1])
    for key in ("run", "project", "name", "status", "config", "notes", "tags", "summary"):
        assert here[key] == there[key], key
    assert [m["name"] for m in here["metrics"]] == [m["name"] for m in there["metrics"]]
    for ours, theirs in zip(here["metrics"], there["metrics"], strict=True):
        assert {k: theirs[k] for k in ours} == ours
    text = cli("show", run_of(directory))[1]
    for part in ("demo/d12", "a note", "optim.lr", "0.02", "step-5", "published", "best"):
        assert part in text


def test_control_characters_of_others_do_not_reach_the_terminal(
    cli: Any, train: Any, online: str
) -> None:
    directory = train("plain", notes="evil \x1b]0;title\x07 note")
    assert cli("sync", directory)[0] == 0
    for target in (directory, run_of(directory)):
        out = cli("show", target)[1]
        assert "\x1b" not in out
        assert "\\x1b]0;title\\x07" in out


def test_a_crashed_and_a_running_run_are_told_apart(cli: Any, place: Path) -> None:
    run = endlex.init("demo", "alive", mode="offline")
    run.log({"loss": float("nan")}, step=0)
    assert run.directory is not None
    shown = json.loads(cli("show", run.directory, "--json")[1])
    assert shown["status"] == "running"
    assert shown["summary"] == {"loss": "NaN"}
    run.finish("failed")
    assert json.loads(cli("show", run.directory, "--json")[1])["status"] == "failed"


def test_compare_shows_last_values_and_what_differs(cli: Any, train: Any) -> None:
    one = train("one", 3, config={"depth": 12, "same": 1})
    two = train("two", 6, config={"depth": 20, "same": 1})
    status, out, _ = cli("compare", one, two)
    assert status == 0
    assert "0.5" in out  # 3 / 6
    assert "depth" in out
    assert "same" not in out
    whole = json.loads(cli("compare", one, two, "--metric", "val/bpb", "--json")[1])
    assert whole["config"] == {"depth": [12, 20]}
    assert [m["last"] for m in whole["metrics"]["val/bpb"]] == [0.8, 0.5]
    assert cli("compare", one)[0] == 2
    status, _, err = cli("compare", one, two, "--metric", "nope")
    assert status == 2
    assert "train/loss" in err


def test_an_ambiguous_name_lists_the_ids(cli: Any, train: Any, online: str) -> None:
    one, two = train("twice"), train("twice")
    assert cli("sync", one, two)[0] == 0
    status, _, err = cli("show", "demo/twice")
    assert status == 1
    assert run_of(one) in err
    assert run_of(two) in err
    status, _, err = cli("show", "none-such")
    assert status == 1
    assert "endlex ls" in err


def test_the_log_is_the_same_of_a_directory_and_of_the_server(
    cli: Any, online: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = endlex.init("logs", "d12", mode="offline", console=True)
    for step in range(3):
        print(f"step {step}")
    run.finish()
    assert cli("sync", run.directory)[0] == 0
    assert cli("show", run.directory, "--log")[1] == "step 0\nstep 1\nstep 2\n"
    assert cli("show", run.id, "--log")[1] == "step 0\nstep 1\nstep 2\n"
