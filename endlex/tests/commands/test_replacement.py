"""Of checkpoints that replace each other the newest stays, and nothing goes before it is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import endlex
from endlex.client.checkpoints import drop_replaced, note_path, staged_names
from endlex.client.shipper.send_checkpoints import Uploader
from endlex.client.transport import Transport
from endlex.client.verify import compare_directory


def save(run: endlex.Run, step: int, replaces: str | None = "last", text: str = "") -> None:
    """Save a small checkpoint, later than those before it by the note's clock too."""
    assert run.directory is not None
    folder = run.directory.parent / f"step_{step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_text(text or f"weights of step {step}")
    name = run.save(folder, step=step, name=f"step_{step}", replaces=replaces)
    os.utime(note_path(run.directory, name), (step, step))


def names_on(transport: Transport, run: endlex.Run) -> list[str]:
    listed: Any = transport.request("GET", f"/runs/{run.id}/checkpoints").content
    assert {entry["state"] for entry in listed} <= {"published"}
    return sorted(entry["name"] for entry in listed)


@pytest.fixture
def transport(server: str) -> Transport:
    return Transport(server)


@pytest.fixture
def run(place: Path) -> endlex.Run:
    return endlex.init("demo", "replacing", mode="offline")


def test_the_newest_replaces_those_on_the_server_with_the_same_word_only(
    cli: Any, online: str, transport: Transport, run: endlex.Run
) -> None:
    save(run, 1)
    save(run, 2, replaces=None)
    save(run, 3, replaces="best")
    assert cli("sync", run.directory)[0] == 0
    assert names_on(transport, run) == ["step_1", "step_2", "step_3"]
    save(run, 4)
    assert cli("sync", run.directory)[0] == 0
    assert names_on(transport, run) == ["step_2", "step_3", "step_4"]
    run.finish()
    assert cli("sync", run.directory)[0] == 0
    status, out, _ = cli("verify", run.directory)
    assert (status, out.splitlines()[-1]) == (0, "safe to tear down")


def test_a_replaced_one_that_still_waits_is_not_sent(
    cli: Any, online: str, transport: Transport, run: endlex.Run
) -> None:
    assert run.directory is not None
    for step in (1, 2, 3):
        save(run, step)
    save(run, 4, replaces=None)
    run.finish()
    assert drop_replaced(run.directory) == ["step_2", "step_1"]
    assert staged_names(run.directory) == ["step_3", "step_4"]
    said = {missing.name for missing in compare_directory(run.directory, transport).missing}
    assert {"step_1", "step_2", "step_3", "step_4"} <= said  # settled only by what is published
    assert cli("sync", run.directory)[0] == 0
    assert names_on(transport, run) == ["step_3", "step_4"]
    assert compare_directory(run.directory, transport).missing == []


def test_one_that_waits_alone_is_not_read(
    online: str, run: endlex.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipper asks twice a second, and the note of many files takes long to parse."""
    assert run.directory is not None
    save(run, 1)
    with monkeypatch.context() as patched:
        patched.setattr("endlex.client.checkpoints.read_note", lambda *_: pytest.fail("it is read"))
        assert drop_replaced(run.directory) == []
    run.finish()


def test_an_older_machine_removes_nothing_of_a_newer_one(
    cli: Any, online: str, transport: Transport, run: endlex.Run, tmp_path: Path
) -> None:
    save(run, 1)
    run.finish()
    with endlex.init(
        "demo", "replacing", id=run.id, directory=tmp_path / "other" / "run", mode="offline"
    ) as later:
        save(later, 2)
    for sent in (later, run):
        assert cli("sync", sent.directory)[0] == 0
    assert "step_2" in names_on(transport, run)
    assert cli("verify", later.directory)[0] == 0
    assert cli("verify", run.directory)[0] == 0


def test_nothing_is_removed_before_the_newer_one_is_published(
    cli: Any, online: str, transport: Transport, run: endlex.Run
) -> None:
    assert run.directory is not None
    save(run, 1)
    assert cli("sync", run.directory)[0] == 0
    save(run, 2)
    file = run.directory / "staged" / "step_2" / "model.bin"
    file.write_text("rewritten in place, and so never published")
    with pytest.raises(endlex.EndlexError, match="rewritten in place"):
        Uploader(transport).send_staged(run.directory, run.id, "step_2")
    assert names_on(transport, run) == ["step_1"]
    run.finish()


def test_the_word_is_checked(run: endlex.Run, place: Path) -> None:
    with pytest.raises(endlex.EndlexError, match="/"):
        save(run, 1, replaces="a/b")
    run.finish()
