"""`endlex sync`: everything, in the foreground, and what interrupts it."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

import endlex
from endlex.client.shipper.control import read_state, unsent
from endlex.commands import transfer
from endlex.reading import session_files


def test_several_directories_and_a_folder_of_them(cli: Any, train: Any, online: str) -> None:
    one, two = train("one"), train("two", save=b"weights")
    status, out, _ = cli("sync", one, two)
    assert status == 0
    assert out.count(f"all on {online}") == 2
    assert cli("sync", "endlex-runs")[0] == 0
    assert cli("verify")[0] == 0


def test_progress_on_a_pipe_is_a_line_in_ten_seconds_for_all_directories(
    cli: Any, train: Any, online: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = types.SimpleNamespace(monotonic=lambda: 1000.0)  # however long it takes
    monkeypatch.setattr("endlex.commands.rendering.time", clock)
    directories = [train(name) for name in ("one", "two", "three")]
    status, out, err = cli("sync", *directories)
    assert (status, out.count("all on")) == (0, 3)
    (line,) = err.splitlines()
    assert line.startswith(f"[1/3] {directories[0]}: journal: ")


def test_one_that_cannot_be_sent_does_not_keep_the_others_back(
    cli: Any, train: Any, online: str
) -> None:
    bad, good = train("bad"), train("good")
    (path,) = (bad / "journal").iterdir()
    path.write_bytes(b'{"type":"nonsense"}\n')
    status, out, _ = cli("sync", bad, good)
    assert status == 1
    assert f"{bad}: not all sent" in out
    assert f"{good}: all on" in out


def test_a_server_that_is_not_there_is_told_at_once(cli: Any, train: Any) -> None:
    directory = train()
    began = time.monotonic()
    status, _, err = cli("sync", directory, "--url", "http://127.0.0.1:1")
    assert status == 1
    assert "endlex serve" in err
    assert time.monotonic() - began < 5
    status, _, err = cli("sync", directory)
    assert status == 1
    assert "ENDLEX_URL" in err


def test_what_is_no_run_is_wrong_usage(cli: Any, online: str, place: Path) -> None:
    status, _, err = cli("sync", "nowhere")
    assert status == 2
    assert "'nowhere' is no run's directory" in err
    (place / "empty").mkdir()
    status, _, err = cli("sync", "empty")
    assert status == 2
    assert "run.json" in err


def test_ctrl_c_names_the_command_that_goes_on(
    cli: Any, train: Any, online: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = train("one"), train("two")
    send = transfer.sync_directory

    def interrupt(directory: Path, *rest: Any, **options: Any) -> None:
        if directory == two:
            raise KeyboardInterrupt
        send(directory, *rest, **options)

    monkeypatch.setattr(transfer, "sync_directory", interrupt)
    status, out, _ = cli("sync", one, two)
    assert status == 130
    assert out.splitlines()[-1].endswith(f"endlex sync {two}")


def test_a_real_interrupt_in_mid_upload_loses_nothing(cli: Any, online: str, place: Path) -> None:
    run = endlex.init("demo", "large", mode="offline")
    (place / "large.bin").write_bytes(os.urandom(48 * 2**20))
    run.save("large.bin", step=0, name="large")
    run.finish()
    command = [sys.executable, "-m", "endlex", "sync", str(run.directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # the first progress
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    if process.returncode:  # else it was done already
        assert process.returncode == 130
        assert f"endlex sync {run.directory}" in out
    assert cli("sync", run.directory)[0] == 0
    status, out, _ = cli("verify", run.directory, "--json")
    assert (status, json.loads(out)["safe"]) == (0, True)


def test_what_a_sync_sent_counts_as_sent_afterwards(cli: Any, train: Any, online: str) -> None:
    directory = train(save=b"weights")
    before = unsent(directory)
    assert before.records == 8  # a session, five steps, a checkpoint, an end
    assert before.files == 1
    assert cli("sync", directory)[0] == 0
    assert not any(unsent(directory))
    assert read_state(directory)["state"] == "done"


@pytest.mark.parametrize("change", ["edited", "grown after an edit", "shorter"])
def test_a_journal_that_differs_is_not_called_sent_and_there_is_a_way_out(
    cli: Any, train: Any, online: str, change: str
) -> None:
    directory = train()
    assert cli("sync", directory)[0] == 0
    (path,) = session_files(directory)
    edited = path.read_bytes().replace(b'"step":1,', b'"step":9,')
    if change == "grown after an edit":
        edited += edited.splitlines(keepends=True)[1]
    elif change == "shorter":
        edited = b"".join(edited.splitlines(keepends=True)[:3])
    path.write_bytes(edited)
    status, out, _ = cli("sync", directory)
    assert status == 1
    assert "differs from" in out
    assert "all on" not in out
    status, out, _ = cli("verify", directory)
    assert (status, f"endlex sync --resend {directory}" in out) == (1, True)
    assert cli("sync", directory, "--resend")[0] == 0
    assert cli("verify", directory)[0] == 0
    (renewed,) = session_files(directory)
    assert renewed.stem != path.stem
    assert renewed.read_bytes().replace(renewed.stem.encode(), path.stem.encode()) == edited


def test_a_directory_that_can_only_be_read_is_sent(
    cli: Any, train: Any, online: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = train("snapshot", save=b"weights")
    before = sorted(path.name for path in directory.rglob("*"))
    plain = io.open

    def is_here(path: Any) -> bool:
        return str(path).startswith(str(directory))

    def opened(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if is_here(path) and any(letter in mode for letter in "wax+"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return plain(path, mode, *rest, **more)

    def refused(name: str) -> Any:
        call = getattr(os, name)

        def act(path: Any, *rest: Any, **more: Any) -> Any:
            if is_here(path) or more.get("dir_fd") is not None:
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return call(path, *rest, **more)

        return act

    with monkeypatch.context() as read_only:
        read_only.setattr(io, "open", opened)
        for name in ("mkdir", "unlink", "rename", "replace", "rmdir"):
            read_only.setattr(os, name, refused(name))
        status, out, _ = cli("sync", directory)
    assert (status, "all on" in out) == (0, True)
    assert sorted(path.name for path in directory.rglob("*")) == before
    assert cli("show", "snapshot", "--json")[1].count('"published"') == 1
