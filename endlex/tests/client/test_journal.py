"""The journal keeps every record that `append` returned from, whatever happens then."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from endlex.client import journal
from endlex.client.journal import Journal
from endlex.protocol import MAX_BATCH_BYTES, METRICS, TEXT, EndlexError
from endlex.reading import content_length, read_journal, read_run, session_files, writer_is_alive

WriteSteps = Callable[[Path, range], Path]


def steps(directory: Path) -> list[int]:
    return [record["step"] for record in read_run(directory) if record["type"] == METRICS]


def test_every_session_has_a_file_and_its_records_their_sequence(
    tmp_path: Path, write_steps: WriteSteps
) -> None:
    directory = tmp_path / "made"
    first, second = write_steps(directory, range(2)).stem, write_steps(directory, range(2, 3)).stem
    assert [path.stem for path in session_files(directory)] == [first, second]
    assert (first[:7], second[:7]) == ("000001-", "000002-")
    records = list(read_run(directory))
    assert [(r["session"], r["seq"]) for r in records] == [
        (first, 0),
        (first, 1),
        (first, 2),
        (second, 0),
        (second, 1),
    ]
    assert steps(directory) == [0, 1, 2]
    assert all(isinstance(record["time"], float) for record in records)


def test_one_record_is_one_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_steps: WriteSteps
) -> None:
    written, write_bytes = [], os.write

    def spy(descriptor: int, content: bytes) -> int:
        written.append(content)
        return write_bytes(descriptor, content)

    monkeypatch.setattr(os, "write", spy)
    write_steps(tmp_path, range(3))
    assert len(written) == 4
    assert all(content.count(b"\n") == 1 and content.endswith(b"\n") for content in written)


def test_what_json_cannot_hold_is_kept(tmp_path: Path) -> None:
    nested = {"values": {"a": math.nan, "b": math.inf}, "list": [-math.inf, 1.5], "path": tmp_path}
    opened = Journal(tmp_path, nested | {"text": "naïve\ntwo lines \ud800"})
    opened.close()
    json.loads(opened.path.read_text(), parse_constant=pytest.fail)
    (record,) = read_journal(opened.path)
    assert record["values"] == {"a": "NaN", "b": "Infinity"}
    assert record["list"] == ["-Infinity", 1.5]
    assert record["path"] == str(tmp_path)
    assert record["text"] == "naïve\ntwo lines ?"


def test_a_record_that_could_never_be_sent_is_refused(tmp_path: Path) -> None:
    opened = Journal(tmp_path, {})
    with pytest.raises(EndlexError, match=r"larger than 8,388,608: log less at once"):
        opened.append(TEXT, {"text": "x" * MAX_BATCH_BYTES})
    opened.append(METRICS, {"step": 1})
    opened.close()
    assert [record["seq"] for record in read_journal(opened.path)] == [0, 1]


def test_a_session_appears_with_its_lock_held_and_its_first_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, rename = [], Path.rename

    def spy(path: Path, target: Path) -> Path:
        assert session_files(tmp_path) == []
        seen.append((writer_is_alive(path), content_length(path) > 0))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", spy)
    opened = Journal(tmp_path, {})
    assert seen == [(True, True)]
    assert writer_is_alive(opened.path)
    opened.close()
    assert not writer_is_alive(opened.path)


def test_a_forked_child_leaves_the_journal_to_its_parent(tmp_path: Path) -> None:
    opened = Journal(tmp_path, {})
    opened.lock.acquire()  # as another thread would while it writes
    child = os.fork()
    if not child:
        opened.append(METRICS, {"step": 99})
        opened.close()
        os._exit(0)
    opened.lock.release()
    assert os.waitpid(child, 0)[1] == 0
    assert writer_is_alive(opened.path)
    opened.append(METRICS, {"step": 0})
    opened.close()
    assert steps(tmp_path) == [0]
    assert [record["seq"] for record in read_run(tmp_path)] == [0, 1]


def test_a_full_disk_delays_records_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bytes, room = os.write, [0]

    def limited(descriptor: int, content: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write_bytes(descriptor, content[: room[0]])
        room[0] -= written
        return written

    opened = Journal(tmp_path, {})
    monkeypatch.setattr(os, "write", limited)
    for step in range(200):
        room[0] += 70 * (step % 2)  # less than a record, or nothing
        opened.append(METRICS, {"step": step})
    room[0] = 10**6
    opened.append(METRICS, {"step": 200})
    opened.close()
    assert steps(tmp_path) == list(range(201))
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_backlog_that_grows_too_large_loses_what_comes_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Journal(tmp_path, {})

    def refuse(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    monkeypatch.setattr(journal, "LARGEST_BACKLOG", 500)
    opened.append(METRICS, {"text": "a" * 200})
    with pytest.raises(OSError, match="No space"):
        opened.append(METRICS, {"text": "a" * 200})
    with pytest.raises(OSError, match="No space"):
        opened.close()
    opened.close()


def test_threads_share_a_journal(tmp_path: Path) -> None:
    opened = Journal(tmp_path, {})
    threads = [
        threading.Thread(target=lambda: [opened.append(METRICS, {"step": 0}) for _ in range(200)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    opened.close()
    assert [record["seq"] for record in read_journal(opened.path)] == list(range(801))


TRAINER = """
import sys
from pathlib import Path
from endlex.client.journal import Journal
journal = Journal(Path(sys.argv[1]), {})
step = int(sys.argv[2])
while True:
    journal.append("metrics", {"step": step, "text": "x" * 300})
    print(step, flush=True)
    step += 1
"""


def test_kill_9_loses_nothing_that_append_returned_from(tmp_path: Path) -> None:
    """One kill; `tests/faults` has the loops."""
    command = [sys.executable, "-c", TRAINER, str(tmp_path), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        for _ in range(137):
            acknowledged = int(trainer.stdout.readline())
        assert writer_is_alive(session_files(tmp_path)[-1])
        trainer.send_signal(signal.SIGKILL)
        for line in trainer.stdout.read().split(b"\n")[:-1]:
            acknowledged = int(line)
    assert not writer_is_alive(session_files(tmp_path)[-1])
    recorded = steps(tmp_path)
    assert recorded[: acknowledged + 1] == list(range(acknowledged + 1))
    assert len(recorded) <= acknowledged + 2  # one more may have been written, not printed
