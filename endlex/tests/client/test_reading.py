"""A journal is read up to its last line end, and damage before that is named."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from endlex.client.journal import Journal
from endlex.client.process import process_name
from endlex.protocol import FINISH, METRICS, EndlexError
from endlex.reading import (
    content_length,
    end_status,
    iter_last_records,
    read_journal,
    read_run,
    session_files,
    writer_is_alive,
)

WriteSteps = Callable[[Path, range], Path]


def steps(directory: Path) -> list[int]:
    return [record["step"] for record in read_run(directory) if record["type"] == METRICS]


def test_sessions_are_in_order_beyond_a_million(tmp_path: Path, write_steps: WriteSteps) -> None:
    (tmp_path / "journal").mkdir()
    for stem in ("1000000-b", "999999-a", "000002-c", "x", "NO", "000001-a.tmp"):
        (tmp_path / "journal" / f"{stem}.jsonl").touch()
    found = [path.stem for path in session_files(tmp_path)]
    assert found == ["x", "000002-c", "999999-a", "1000000-b"]
    assert write_steps(tmp_path, range(1)).stem.startswith("1000001-")


def test_a_last_line_torn_at_any_byte_costs_that_line_only(
    tmp_path: Path, write_steps: WriteSteps
) -> None:
    path = write_steps(tmp_path, range(3))
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        assert steps(tmp_path) == [0, 1]
        assert content_length(path) == last
        assert end_status(path) is None
    write_steps(tmp_path, range(10, 12))
    assert steps(tmp_path) == [0, 1, 10, 11]
    path.write_bytes(whole)
    assert content_length(path) == len(whole)
    assert steps(tmp_path) == [0, 1, 2, 10, 11]


def test_damage_in_the_middle_is_named(tmp_path: Path, write_steps: WriteSteps) -> None:
    path = write_steps(tmp_path, range(4))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\0" * 20 + b"\n", *lines[3:]]))
    with pytest.raises(EndlexError, match="line 3 is not a record"):
        list(read_journal(path))


def test_content_ends_at_the_last_line_end_of_long_lines_too(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b"")
    assert content_length(path) == 0
    path.write_bytes(b"x" * 200_000)
    assert content_length(path) == 0
    path.write_bytes(b"x" * 200_000 + b"\n" + b"y" * 300_000)
    assert content_length(path) == 200_001


def test_the_end_of_a_session_is_read_from_its_tail(tmp_path: Path) -> None:
    opened = Journal(tmp_path, {})
    for step in range(1000):
        opened.append(METRICS, {"step": step})
    assert end_status(opened.path) is None
    tail = list(iter_last_records(opened.path, 1000))
    assert [record["step"] for record in tail[:2]] == [999, 998]
    assert 1 < len(tail) < 20
    opened.append(FINISH, {"status": "failed"})
    opened.close()
    assert end_status(opened.path) == "failed"


def test_without_locks_the_process_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    name = process_name()
    for start, alive in (
        ({"process": name}, True),
        ({"process": name.replace(str(os.getpid()), str(2**22 + 1), 1)}, False),
        ({"process": name.replace(os.uname().nodename, "elsewhere")}, False),
        ({}, False),
    ):
        opened = Journal(tmp_path, start)
        assert writer_is_alive(opened.path) is alive
        opened.close()
