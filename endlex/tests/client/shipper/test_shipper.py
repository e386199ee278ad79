"""The shipper as a process: it outlives the trainer, takes up what another one left, and ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import endlex
from endlex.client.journal import Journal
from endlex.client.shipper.control import (
    BACKGROUND,
    read_state,
    shipper_process,
    start_shipper,
    stop_shipper,
    take_lock,
)
from endlex.reading import read_run, session_files

Until = Callable[..., None]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A run's directory; whatever shipper a test leaves there is ended."""
    place = tmp_path / "run"
    yield place
    if place.exists():
        stop_shipper(place, seconds=0.5)


def is_mirrored(stub: Any, directory: Path) -> bool:
    """Whether the server has every journal, byte for byte."""
    return all(stub.content(p.stem) == p.read_bytes() for p in session_files(directory))


def kill_shipper(directory: Path, number: int) -> None:
    """Send a signal to the shipper, and to nobody else."""
    found = shipper_process(directory)
    assert found is not None
    assert found[0] > 1
    os.kill(found[0], number)


def trainer_sessions(directory: Path) -> list[str]:
    return [
        record["session"]
        for record in read_run(directory)
        if record["type"] == "session" and record["kind"] == "trainer"
    ]


TRAINER = """
import endlex, sys, time
run = endlex.init("p", "d4", directory=sys.argv[1])
for step in range(int(sys.argv[2])):
    run.log({"loss": 1 / (step + 1)})
print("logged", flush=True)
if sys.argv[3:] == ["finish"]:
    run.finish()
else:
    time.sleep(60)
"""


def start_trainer(directory: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", TRAINER, str(directory), *arguments]
    env = {**os.environ, **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)


@pytest.mark.slow
def test_a_run_arrives_while_it_goes_on_and_the_shipper_ends_with_it(
    stub: Any, directory: Path, monkeypatch: pytest.MonkeyPatch, until: Until, capfd: Any
) -> None:
    monkeypatch.setenv("ENDLEX_URL", stub.url)
    run = endlex.init("p", "d4", directory=directory)
    run.log({"loss": 2.0})
    stub.wait_for(lambda: b'"loss":2.0' in stub.content(run.session))
    pid = shipper_process(directory)
    assert pid is not None
    run.finish()
    assert stub.content(run.session).endswith(b'"status":"finished"}\n')
    until(lambda: shipper_process(directory) is None)
    assert is_mirrored(stub, directory)
    assert (run.session, "finished") in stub.states
    assert {session for session, _ in stub.states} == {p.stem for p in session_files(directory)}
    assert read_state(directory)["state"] == "done"
    assert capfd.readouterr().err == f"endlex: p/d4 is at {stub.url}/runs/{run.id}\n"


def test_a_killed_trainer_is_reported_and_all_that_it_logged_arrives(
    stub: Any, directory: Path, until: Until
) -> None:
    trainer = start_trainer(directory, "500", ENDLEX_URL=stub.url)
    assert trainer.stdout is not None
    trainer.stdout.readline()
    trainer.kill()
    trainer.communicate()
    stub.wait_for(lambda: "crashed" in dict(map(reversed, stub.states)))
    until(lambda: shipper_process(directory) is None)
    (session,) = trainer_sessions(directory)
    assert (session, "crashed") in stub.states
    assert is_mirrored(stub, directory)
    assert (
        sum(r["type"] == "metrics" and r["session"] == session for r in read_run(directory)) == 500
    )
    assert {s for s, status in stub.states if status == "crashed"} == {session}


def test_the_next_shipper_goes_on_where_a_killed_one_was(
    stub: Any, directory: Path, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    monkeypatch.setenv("ENDLEX_URL", stub.url)
    run = endlex.init("p", "d4", directory=directory)
    for _ in range(4):
        until(lambda: shipper_process(directory) is not None)
        run.log({"loss": 1.0})
        kill_shipper(directory, signal.SIGKILL)
        until(lambda: shipper_process(directory) is None)
        run.log({"loss": 2.0})
        run._next_watch = 0.0  # as after a minute
        run.log({"loss": 3.0})
    run.finish()
    assert stub.content(run.session).count(b'"type":"metrics"') == 12
    until(lambda: shipper_process(directory) is None)
    assert is_mirrored(stub, directory)
    assert not [s for s, status in stub.states if status == "crashed"]


def test_a_server_that_starts_late_gets_everything(
    stub: Any, directory: Path, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    stub.stop()
    monkeypatch.setenv("ENDLEX_URL", stub.url)
    run = endlex.init("p", "d4", directory=directory)
    for step in range(100):
        run.log({"loss": 1.0}, step=step)
    until(lambda: "cannot reach" in str(read_state(directory).get("error")))
    stub.restart()
    stub.wait_for(lambda: is_mirrored(stub, directory))
    run.finish()
    assert stub.content(run.session) == session_files(directory)[0].read_bytes()


@pytest.mark.parametrize("kind", ["dead", "black hole"])
def test_finish_does_not_wait_for_a_server_that_does_not_answer(
    stub: Any,
    black_hole: str,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    tmp_path: Path,
    kind: str,
) -> None:
    monkeypatch.setenv("ENDLEX_URL", black_hole if kind == "black hole" else "http://127.0.0.1:9")
    monkeypatch.setattr("endlex.client.shipper.control.FINISH_SECONDS", 1.0)
    run = endlex.init("p", "d4", directory=directory)
    run.log({"loss": 1.0})
    weights = tmp_path / "weights"
    weights.write_bytes(b"w")
    run.save(weights, step=3)
    began = time.monotonic()
    run.finish()
    assert time.monotonic() - began < 2
    said = capfd.readouterr().err
    assert "records (" in said
    assert "and 1 files of checkpoints and pictures are not on the server yet" in said
    assert f"to send them later: endlex sync {directory}" in said


def test_finish_starts_no_second_shipper_while_the_first_begins(
    stub: Any, directory: Path, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    started: list[Path] = []
    monkeypatch.setattr("endlex.client.shipper.control.start_shipper", started.append)
    monkeypatch.setattr("endlex.client.shipper.control.FINISH_SECONDS", 60.0)
    monkeypatch.setattr("endlex.client.shipper.control.BEGIN_SECONDS", 60.0)
    run = endlex.init("p", "d4", directory=directory)
    run.log({"loss": 1.0})
    monkeypatch.setenv("ENDLEX_URL", stub.url)
    start_shipper(directory)  # has no lock yet when `finish` looks
    run.go_online(stub.url)
    assert started == [directory]
    run.finish()
    assert started == [directory]
    until(lambda: is_mirrored(stub, directory))


@pytest.mark.parametrize("finish_seconds", [0.1, 1.0])
def test_finish_starts_a_shipper_that_was_killed(
    stub: Any, directory: Path, monkeypatch: pytest.MonkeyPatch, until: Until, finish_seconds: float
) -> None:
    monkeypatch.setenv("ENDLEX_URL", stub.url)
    monkeypatch.setattr("endlex.client.shipper.control.FINISH_SECONDS", finish_seconds)
    monkeypatch.setattr("endlex.client.shipper.control.BEGIN_SECONDS", 0.2)
    run = endlex.init("p", "d4", directory=directory)
    until(lambda: shipper_process(directory) is not None)
    kill_shipper(directory, signal.SIGKILL)
    until(lambda: shipper_process(directory) is None)
    run.log({"loss": 1.0})
    run.finish()
    until(lambda: is_mirrored(stub, directory))


def test_finish_says_what_can_never_be_sent_and_waits_for_no_more(
    stub: Any, directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr("endlex.client.checkpoints._clone", lambda *arguments: False)
    monkeypatch.setattr("endlex.client.shipper.control.FINISH_SECONDS", 60.0)
    run = endlex.init("p", "d4", directory=directory)
    (tmp_path / "last.pt").write_bytes(b"first")
    run.save(tmp_path / "last.pt", step=1, link=True)
    (tmp_path / "last.pt").write_bytes(b"over the first")
    monkeypatch.setenv("ENDLEX_URL", stub.url)
    run.go_online(stub.url)
    began = time.monotonic()
    run.finish()
    assert time.monotonic() - began < 30
    said = capfd.readouterr().err
    assert "endlex: checkpoint last.pt-1 cannot be sent: file" in said
    assert "not on the server yet" not in said


def test_a_refused_token_is_said_and_tried_again_rarely(
    stub: Any,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    until: Until,
    tmp_path: Path,
    capfd: Any,
) -> None:
    stub.token = "right"
    token = tmp_path / "home" / ".config" / "endlex" / "token"
    token.parent.mkdir(parents=True)
    token.write_text("wrong-token\n")
    monkeypatch.setenv("ENDLEX_URL", stub.url)
    run = endlex.init("p", "d4", directory=directory)
    run.log({"loss": 1.0})
    until(lambda: "401" in str(read_state(directory).get("error")))
    state = read_state(directory)
    assert "401" in state["sessions"][run.session]["error"]
    files = [path.read_bytes() for path in directory.iterdir() if path.is_file()]
    assert not any(b"wrong-token" in content for content in files)
    asked = len(stub.requests)
    monkeypatch.setattr("endlex.client.shipper.control.FINISH_SECONDS", 1.5)
    run.finish()
    assert len(stub.requests) - asked <= 1
    assert "401" in capfd.readouterr().err


def test_what_keeps_the_shipper_from_starting_is_said_at_the_end(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, until: Until
) -> None:
    monkeypatch.setenv("ENDLEX_URL", "ftp://example.org")
    monkeypatch.setattr("endlex.client.shipper.control.FINISH_SECONDS", 0.1)
    run = endlex.init("p", "d4", directory=directory)
    until(lambda: read_state(directory).get("state") == "failed")
    run.finish()
    assert "URL 'ftp://example.org' must look like https://host[:port]" in capfd.readouterr().err


@pytest.mark.slow
def test_a_new_session_is_taken_up_by_the_shipper_that_is_there(
    stub: Any, directory: Path, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    monkeypatch.setenv("ENDLEX_URL", stub.url)
    first = endlex.init("p", "d4", directory=directory)
    until(lambda: shipper_process(directory) is not None)
    pid = shipper_process(directory)
    second = endlex.init("p", "d4", directory=directory)
    second.log({"loss": 1.0})
    stub.wait_for(lambda: b'"loss"' in stub.content(second.session))
    assert shipper_process(directory) == pid
    first.finish()
    second.finish()
    until(lambda: shipper_process(directory) is None)
    assert is_mirrored(stub, directory)


@pytest.mark.slow
def test_sessions_in_quick_succession_are_all_sent(
    stub: Any, directory: Path, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    monkeypatch.setenv("ENDLEX_URL", stub.url)
    monkeypatch.setattr("endlex.client.shipper.control.FINISH_SECONDS", 0.3)
    for step in range(6):  # each may meet the shipper of the one before as it ends
        run = endlex.init("p", "d4", directory=directory)
        run.log({"loss": 1.0}, step=step)
        run.finish()
    until(lambda: is_mirrored(stub, directory))
    until(lambda: shipper_process(directory) is None)
    assert is_mirrored(stub, directory)
    assert len(trainer_sessions(directory)) == 6


def test_only_one_shipper_serves_a_directory(stub: Any, tmp_path: Path, until: Until) -> None:
    Journal(tmp_path, {"kind": "trainer"}).close()
    with take_lock(tmp_path, BACKGROUND) as lock:  # type: ignore[union-attr]
        assert lock is not None
        assert take_lock(tmp_path, BACKGROUND, seconds=0.05) is None
        assert shipper_process(tmp_path)[:2] == (os.getpid(), BACKGROUND)  # type: ignore[index]
    assert shipper_process(tmp_path) is None


def test_sigterm_ends_it_for_good_and_says_so(
    stub: Any, directory: Path, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    monkeypatch.setenv("ENDLEX_URL", stub.url)
    run = endlex.init("p", "d4", directory=directory)
    stub.wait_for(lambda: run.session in {s for _, s in stub.journals})
    kill_shipper(directory, signal.SIGTERM)
    until(lambda: shipper_process(directory) is None)
    until(lambda: read_state(directory).get("state") == "stopped")
    run._next_watch = 0.0
    run.log({"loss": 1.0})
    assert shipper_process(directory) is None
    start_shipper(directory)
    stub.wait_for(lambda: b'"loss"' in stub.content(run.session))
    run.finish()


def test_the_shipper_has_no_open_files_of_the_trainer(
    stub: Any, directory: Path, monkeypatch: pytest.MonkeyPatch, until: Until, tmp_path: Path
) -> None:
    monkeypatch.setenv("ENDLEX_URL", stub.url)
    with (tmp_path / "secret").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        run = endlex.init("p", "d4", directory=directory)
        stub.wait_for(lambda: run.session in {s for _, s in stub.journals})
        found = shipper_process(directory)
        assert found is not None
        process = Path("/proc") / str(found[0])
        if process.exists():
            links = []
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    links.append(str(descriptor.readlink()))
            assert str(tmp_path / "secret") not in links
            nice = int((process / "stat").read_text().split()[18])
            assert nice == min(19, os.nice(0) + 10)
            assert os.getsid(found[0]) != os.getsid(0)
    run.finish()


def test_a_clock_that_jumps_back_changes_nothing(
    stub: Any, directory: Path, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    monkeypatch.setenv("ENDLEX_URL", stub.url)
    run = endlex.init("p", "d4", directory=directory)
    run.log({"loss": 1.0})
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    run.log({"loss": 2.0})
    run.finish()
    records = [json.loads(line) for line in stub.content(run.session).splitlines()]
    assert [r["seq"] for r in records] == [0, 1, 2, 3]
    assert [r["time"] for r in records][2:] == [1000.0, 1000.0]
    assert [r["values"]["loss"] for r in records if r["type"] == "metrics"] == [1.0, 2.0]


@pytest.mark.slow
def test_a_full_disk_on_this_side_stops_no_shipping(
    stub: Any, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endlex.init("p", "d4", directory=directory).finish()
    monkeypatch.setenv("ENDLEX_URL", stub.url)
    (directory / "shipper.json").mkdir()  # what cannot be replaced stands for a disk that is full
    (directory / "shipper.lock").symlink_to("/dev/full")
    faults = iter([503, 503])
    stub.before = lambda method, path: next(faults, None)  # so that there is something to say
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "endlex.client.shipper", str(directory)]
        subprocess.run(command, stdout=full, stderr=full, timeout=60)
    (directory / "shipper.lock").unlink()
    assert is_mirrored(stub, directory)


def test_a_full_disk_delays_a_checkpoint_and_does_not_lose_it(
    stub: Any, directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from endlex.client import checkpoints
    from endlex.client.shipper.send_checkpoints import CheckpointShipper
    from endlex.client.transport import Transport

    write, refusals = checkpoints.write_whole, iter([OSError("No space left on device")])

    def limited(*arguments: Any) -> None:
        for error in refusals:
            raise error
        write(*arguments)

    run = endlex.init("p", "d4", directory=directory)
    (tmp_path / "weights").write_bytes(b"w")
    name = run.save(tmp_path / "weights", step=1)
    monkeypatch.setattr(checkpoints, "write_whole", limited)
    monkeypatch.setattr("endlex.client.shipper.send_checkpoints.REFUSED_SECONDS", 0.01)
    shipper = CheckpointShipper(directory, run.id, Transport(stub.url))
    shipper.start()
    stub.wait_for(lambda: (run.id, name) in stub.manifests)
    shipper.stop()
    run.finish()
