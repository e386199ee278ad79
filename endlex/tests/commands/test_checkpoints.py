"""`endlex pull` and `endlex push` against a real server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import endlex
from endlex.api import choose_checkpoint
from endlex.client.directories import read_run_file
from endlex.protocol import EndlexError


def run_of(directory: Path) -> str:
    owner = read_run_file(directory)
    assert owner is not None
    return owner["run"]


@pytest.mark.parametrize("which", ["", "@last", "@best", "@5", "@step-5"])
def test_pull_by_every_word(cli: Any, train: Any, online: str, place: Path, which: str) -> None:
    directory = train("pulled", save=b"weights" * 1000)
    assert cli("sync", directory)[0] == 0
    run = run_of(directory)
    status, out, _ = cli("pull", f"{run}{which}", "out")
    assert status == 0
    assert (place / "out" / "pulled.bin").read_bytes() == b"weights" * 1000
    assert "every hash verified" in out
    assert run in out


def test_a_resumed_run_joins_the_one_that_was_pulled(
    cli: Any, train: Any, online: str, place: Path
) -> None:
    directory = train("joined", save=b"weights")
    assert cli("sync", directory)[0] == 0
    assert cli("pull", run_of(directory), "out")[0] == 0
    again = endlex.init("demo", "joined", directory="out", mode="offline")
    again.log({"train/loss": 0.1}, step=99)
    again.finish()
    assert again.id == run_of(directory)
    assert cli("sync", "out")[0] == 0
    status, out, _ = cli("show", again.id, "--json")
    assert status == 0
    assert len(json.loads(out)["sessions"]) == 2


def test_a_file_in_the_way_stays(cli: Any, train: Any, online: str, place: Path) -> None:
    directory = train("inway", save=b"weights")
    assert cli("sync", directory)[0] == 0
    (place / "out").mkdir()
    (place / "out" / "inway.bin").write_bytes(b"mine")
    status, _, err = cli("pull", run_of(directory), "out")
    assert status == 1
    assert "there already and differs" in err
    assert (place / "out" / "inway.bin").read_bytes() == b"mine"


def test_another_run_s_run_file_stays(cli: Any, train: Any, online: str, place: Path) -> None:
    directory = train("first", save=b"weights")
    assert cli("sync", directory)[0] == 0
    other = place / "out" / "run.json"
    other.parent.mkdir()
    other.write_text('{"run":"aaaaaaaaaa","project":"p","name":"n","created":1}')
    status, out, _ = cli("pull", run_of(directory), "out")
    assert status == 0
    assert "left as it is" in out
    assert "aaaaaaaaaa" in other.read_text()


def test_push_to_a_run_and_to_a_new_one(cli: Any, train: Any, online: str, place: Path) -> None:
    directory = train("pushed")
    assert cli("sync", directory)[0] == 0
    folder = place / "weights"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.bin").write_bytes(b"a" * 100)
    (folder / "b.bin").write_bytes(b"b")
    run = run_of(directory)
    for _ in range(2):  # the same again is the same
        status, out, _ = cli(
            "push", folder, "--run", run, "--name", "w", "--step", 3, "--alias", "best"
        )
        assert status == 0
        assert "checkpoint w of run" in out
        assert "2 files, 101 B, published" in out
    assert cli("pull", f"{run}@best", "out")[0] == 0
    assert (place / "out" / "deep" / "a.bin").read_bytes() == b"a" * 100
    status, out, _ = cli("push", folder, "--project", "fresh")
    assert status == 0
    new = out.split("of run ")[1].partition(":")[0]
    assert json.loads(cli("show", new, "--json")[1])["project"] == "fresh"


def test_pushing_nothing_makes_no_run(cli: Any, online: str, place: Path) -> None:
    (place / "empty").mkdir()
    status, _, err = cli("push", "empty")
    assert (status, err) == (1, "endlex: 'empty' holds no files: nothing to push\n")
    assert not (place / "endlex-runs").exists()


def test_what_cannot_be_meant_is_said_with_what_there_is() -> None:
    def saved(name: str, step: int, **more: Any) -> dict[str, Any]:
        return {"name": name, "step": step, "created": 1.0, "state": "published", **more}

    three = [saved("a", 1), saved("b", 2, aliases=["best"]), saved("c", 2, created=2.0)]
    assert choose_checkpoint(three, "last", "r")["name"] == "c"
    assert choose_checkpoint(three, "best", "r")["name"] == "b"
    assert choose_checkpoint(three, "1", "r")["name"] == "a"
    with pytest.raises(EndlexError, match=r"several checkpoints of step 2.*b \(step 2\)"):
        choose_checkpoint(three, "2", "r")
    with pytest.raises(EndlexError, match=r"no checkpoint '7'.*a \(step 1\)"):
        choose_checkpoint(three, "7", "r")
    with pytest.raises(EndlexError, match="alias best"):
        choose_checkpoint(three[:1], "best", "r")
    with pytest.raises(EndlexError, match="a is verifying"):
        choose_checkpoint([saved("a", 1) | {"state": "verifying"}], "last", "r")


def test_wrong_usage(cli: Any, online: str, place: Path) -> None:
    assert cli("push", "nothing.bin")[0] == 2
    (place / "file").write_bytes(b"")
    status, _, err = cli("pull", "run", "file")
    assert status == 2
    assert "is a file" in err
    status, _, err = cli("push", "file", "--run", "r", "--project", "p")
    assert status == 2
    status, _, err = cli("push", "file", "--run", "unknown0")
    assert status == 1
    assert "has no run 'unknown0'" in err
