"""A process is known by more than its id, and what cannot be locked is sent all the same."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import endlex
from endlex.client import process
from endlex.client.process import is_running, process_name, warn_once
from endlex.client.shipper.control import (
    BACKGROUND,
    LOCK_FILE,
    shipper_process,
    stop_shipper,
    take_lock,
)
from endlex.client.transfers import sync_directory
from endlex.protocol import EndlexError
from endlex.reading import session_files, writer_is_alive


@pytest.fixture
def sleeper() -> Any:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_process_is_named_apart_from_others_with_its_id(sleeper: Any) -> None:
    name = process_name(sleeper.pid)
    assert is_running(name)
    pid, start, host, boot, namespace = name.split()
    for other in (
        f"{pid} {int(start) - 1} {host} {boot} {namespace}",  # the id was given again
        f"{pid} {start} other {boot} {namespace}",
        f"{pid} {start} {host} {'0' * 36} {namespace}",
        f"{pid} {start} {host} {boot} pid:[1]",  # another container
        pid,
        "",
        None,
    ):
        assert not is_running(other)
    sleeper.kill()
    sleeper.wait()
    assert not is_running(name)


@pytest.mark.parametrize("part", [1, 2, 3, 4])
def test_a_process_id_of_elsewhere_is_not_signalled(
    sleeper: Any, tmp_path: Path, part: int
) -> None:
    name = process_name(sleeper.pid).split()
    name[part] = "1"
    with take_lock(tmp_path, BACKGROUND):  # type: ignore[union-attr]
        (tmp_path / LOCK_FILE).write_text(f"{name[0]} {BACKGROUND} {' '.join(name[1:])}\n")
        with pytest.raises(EndlexError, match=f"process {sleeper.pid} .*wait for it, or end it"):
            stop_shipper(tmp_path)
    assert sleeper.poll() is None


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    warn_once.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_run_is_sent_and_the_warning_comes_once(
    stub: Any, transport: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = endlex.init("p", "r", directory=tmp_path / "run")
    run.log({"a": 1.0})
    assert run.directory is not None
    (path,) = session_files(run.directory)
    assert writer_is_alive(path)
    sync_directory(run.directory, transport)
    run.finish()
    sync_directory(run.directory, transport)
    assert stub.content(path.stem) == path.read_bytes()
    assert capsys.readouterr().err.count("files cannot be locked here") == 1


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_process_that_is_named_keeps_others_out(
    sleeper: Any, tmp_path: Path
) -> None:
    pid, _, name = process_name(sleeper.pid).partition(" ")
    (tmp_path / LOCK_FILE).write_text(f"{pid} {BACKGROUND} {name}\n")
    assert take_lock(tmp_path, BACKGROUND) is None
    sleeper.kill()
    sleeper.wait()
    assert shipper_process(tmp_path) is None
    assert take_lock(tmp_path, BACKGROUND) is not None
    assert shipper_process(tmp_path).pid == os.getpid()  # type: ignore[union-attr]


def test_only_what_says_taken_means_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.ENOSYS, errno.ENOLCK):

        def answer(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", answer)
        taken = process.try_lock(0) is False
        assert taken == (number not in (errno.ENOSYS, errno.ENOLCK))


def test_a_file_system_that_cannot_fsync_is_no_fault_and_a_failing_disk_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(number: int) -> Any:
        def fsync(_: int) -> None:
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", answer(errno.EINVAL))
    endlex.init("p", "r", directory=tmp_path / "run").finish()
    monkeypatch.setattr(os, "fsync", answer(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        process.fsync(0)


def test_two_containers_do_not_share_names_of_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 7)  # as in both of them
    opened: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda s, t: (opened.append(s.name), replace(s, t))[1])
    from endlex.client.process import write_whole

    threads = [threading.Thread(target=write_whole, args=(tmp_path / "f", b"x")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(opened)) == 4
