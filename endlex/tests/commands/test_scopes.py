"""A rented box's token is enough for what a box does, and for nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import endlex
from endlex.client.directories import read_run_file


@pytest.fixture
def box(cli: Any, closed_server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment of a box with a token for write and checkpoint; returns the token."""
    url, data = closed_server
    made = cli("token", "create", "--name", "box", "--scope", "write,checkpoint", "--data", data)
    token = str(made[1].strip())
    monkeypatch.setenv("ENDLEX_URL", url)
    monkeypatch.setenv("ENDLEX_TOKEN", token)
    return token


def test_a_box_syncs_verifies_pushes_and_pulls_by_id(
    cli: Any, box: str, train: Any, place: Path
) -> None:
    directory = train(save=b"weights")
    owner = read_run_file(directory)
    assert owner is not None
    assert cli("sync", directory)[0] == 0
    assert cli("verify", directory)[0] == 0
    assert cli("push", place / "d12.bin", "--run", owner["run"], "--name", "again")[0] == 0
    status, out, _ = cli("pull", f"{owner['run']}@best", "out")
    assert status == 0
    assert f"ENDLEX_RUN_ID={owner['run']}" in out
    assert (place / "out" / "d12.bin").read_bytes() == b"weights"


def test_a_box_replaces_its_last_checkpoint_without_a_right_to_delete(
    cli: Any, box: str, place: Path
) -> None:
    run = endlex.init("demo", "d12", mode="offline")
    for step in (1, 2):
        (place / "model").write_bytes(b"weights %d" % step)
        run.save(place / "model", step=step, name=f"step_{step}", replaces="last")
        assert cli("sync", run.directory)[0] == 0
    run.finish()
    assert cli("sync", run.directory)[0] == 0
    assert cli("verify", run.directory)[0] == 0
    assert cli("pull", f"{run.id}@step_2", "out")[0] == 0
    assert cli("pull", f"{run.id}@step_1", "out")[0] == 1
    assert cli("prune", "--run", run.id, "--keep-last", "1", "--yes")[0] == 1


def test_a_box_reads_nothing_else(cli: Any, box: str, train: Any) -> None:
    directory = train()
    assert cli("sync", directory)[0] == 0
    owner = read_run_file(directory)
    assert owner is not None
    for words in (["ls"], ["show", "d12"], ["export", owner["run"]], ["pull", "d12", "out"]):
        status, out, err = cli(*words)
        assert status == 1, words
        assert "403" in err
        assert box not in out + err


def test_without_a_token_nothing_is_allowed_and_the_remedy_is_named(
    cli: Any, box: str, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = train()
    for token in ("", "endlex_wrong"):
        monkeypatch.setenv("ENDLEX_TOKEN", token)
        status, out, err = cli("sync", directory)
        assert status == 1
        assert "401" in out + err
        status, out, _ = cli("verify", directory)
        assert status == 1
        assert "NOT safe to tear down" in out
        status, out, _ = cli("doctor")
        assert status == 1
        assert "ENDLEX_TOKEN" in out


def test_the_token_may_lie_in_a_file(
    cli: Any, box: str, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ENDLEX_TOKEN")
    file = Path.home() / ".config" / "endlex" / "token"
    file.parent.mkdir(parents=True)
    file.write_text(box + "\n")
    directory = train()
    assert cli("sync", directory)[0] == 0


def test_a_reader_exports_whole_files(
    cli: Any,
    box: str,
    train: Any,
    place: Path,
    closed_server: tuple[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = train()
    assert cli("sync", directory)[0] == 0
    owner = read_run_file(directory)
    assert owner is not None
    data = closed_server[1]
    made = cli("token", "create", "--name", "me", "--scope", "read", "--data", data)
    monkeypatch.setenv("ENDLEX_TOKEN", made[1].strip())
    for kind in ("csv", "json", "parquet"):
        assert cli("export", owner["run"], "-o", f"run.{kind}")[0] == 0
        assert (place / f"run.{kind}").stat().st_size > 100
