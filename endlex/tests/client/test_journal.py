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
from pathlib import Path

import pytest

from endlex.client import journal
from endlex.client.journal import Journal, read_journal
from endlex.protocol import METRICS, SESSION, EndlexError


def write(path: Path, steps: range) -> str:
    opened = Journal(path)
    opened.append(SESSION, {"name": "run"})
    for step in steps:
        opened.append(METRICS, {"step": step})
    opened.close()
    return opened.session


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_journal(path) if record["type"] == METRICS]


def test_records_carry_their_session_and_sequence(tmp_path: Path) -> None:
    path = tmp_path / "made" / "journal.jsonl"
    first, second = write(path, range(2)), write(path, range(2, 3))
    assert first != second
    records = list(read_journal(path))
    assert [(r["session"], r["seq"]) for r in records] == [
        (first, 0),
        (first, 1),
        (first, 2),
        (second, 0),
        (second, 1),
    ]
    assert steps(path) == [0, 1, 2]
    assert all(isinstance(record["time"], float) for record in records)


def test_one_record_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, write_bytes = [], os.write

    def spy(descriptor: int, content: bytes) -> int:
        written.append(content)
        return write_bytes(descriptor, content)

    monkeypatch.setattr(os, "write", spy)
    write(tmp_path / "j", range(3))
    assert len(written) == 4
    assert all(content.count(b"\n") == 1 and content.endswith(b"\n") for content in written)


def test_what_json_cannot_hold_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "j"
    opened = Journal(path)
    nested = {"values": {"a": math.nan, "b": math.inf}, "list": [-math.inf, 1.5], "path": tmp_path}
    opened.append("x", nested | {"text": "naïve\ntwo lines \ud800"})
    opened.close()
    json.loads(path.read_text(), parse_constant=pytest.fail)
    (record,) = read_journal(path)
    assert record["values"] == {"a": "NaN", "b": "Infinity"}
    assert record["list"] == ["-Infinity", 1.5]
    assert record["path"] == str(tmp_path)
    assert record["text"] == "naïve\ntwo lines ?"


def test_a_last_line_torn_at_any_byte_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, range(3))
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        assert steps(path) == [0, 1]
        write(path, range(10, 12))
        # Without only its line end the record was whole, and the next session reveals it.
        assert steps(path) == ([0, 1, 2] if cut == len(whole) - 1 else [0, 1]) + [10, 11]


def test_a_torn_first_line_and_several_torn_sessions_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "j"
    for step in range(3):
        with path.open("ab") as file:
            file.write(b'{"type":"session","ses')
        write(path, range(step, step + 1))
    with path.open("ab") as file:
        file.write(b'{"type"\n{"ty')
    assert steps(path) == [0, 1, 2]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, range(4))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\0" * 20 + b"\n", *lines[3:]]))
    with pytest.raises(EndlexError, match="line 3 is not a record"):
        list(read_journal(path))


def test_a_full_disk_delays_records_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, write_bytes = tmp_path / "j", os.write
    room = [0]

    def limited(descriptor: int, content: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write_bytes(descriptor, content[: room[0]])
        room[0] -= written
        return written

    opened = Journal(path)
    opened.append(SESSION, {})
    monkeypatch.setattr(os, "write", limited)
    for step in range(200):
        room[0] += 70 * (step % 2)  # less than a record, or nothing
        opened.append(METRICS, {"step": step})
    room[0] = 10**6
    opened.append(METRICS, {"step": 200})
    opened.close()
    assert steps(path) == list(range(201))
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_backlog_that_grows_too_large_stops_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Journal(tmp_path / "j")

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
    opened = Journal(tmp_path / "j")
    threads = [
        threading.Thread(target=lambda: [opened.append(METRICS, {"step": 0}) for _ in range(200)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    opened.close()
    assert [record["seq"] for record in read_journal(tmp_path / "j")] == list(range(800))


TRAINER = """
import sys
from pathlib import Path
from endlex.client.journal import Journal
journal = Journal(Path(sys.argv[1]))
journal.append("session", {})
step = int(sys.argv[2])
while True:
    journal.append("metrics", {"step": step, "text": "x" * 300})
    print(step, flush=True)
    step += 1
"""


def test_kill_9_loses_nothing_that_append_returned_from(tmp_path: Path) -> None:
    path, acknowledged = tmp_path / "j", -1
    for seed in range(5):
        command = [sys.executable, "-c", TRAINER, str(path), str(acknowledged + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as trainer:
            assert trainer.stdout is not None
            for _ in range(50 + 37 * seed):
                acknowledged = int(trainer.stdout.readline())
            trainer.send_signal(signal.SIGKILL)
            for line in trainer.stdout.read().split(b"\n")[:-1]:
                acknowledged = int(line)
        recorded = steps(path)
        assert recorded[: acknowledged + 1] == list(range(acknowledged + 1))
        assert len(recorded) <= acknowledged + 2  # one more may have been written, not printed
        acknowledged = len(recorded) - 1
    assert len({record["session"] for record in read_journal(path)}) == 5
