"""wandb's offline runs, as the real library wrote them (make_fixtures.py)."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wandb", reason="the importers need the extra endlex[import]")

from wandb.proto import wandb_internal_pb2

from endlex.importers.wandb import FRAGMENT, FULL, find_runs, import_wandb, iter_records
from endlex.protocol import EndlexError, decode_number
from endlex.reading import session_files, session_status

FIXTURE = Path(__file__).parent / "fixtures" / "wandb"
FILE = FIXTURE / "run-abcdefgh.wandb"


def records(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = [
        json.loads(line)
        for file in sorted((directory / "journal").iterdir())
        for line in file.read_bytes().splitlines()
    ]
    return [line for line in lines if line["type"] == kind]


def test_a_real_offline_run(tmp_path: Path) -> None:
    imported = import_wandb(FILE, tmp_path)
    assert imported.run == "abcdefgh"
    assert imported.directory == tmp_path / "import-test" / "d12-abcdefgh"
    run = json.loads((imported.directory / "run.json").read_text())
    assert (run["run"], run["project"], run["name"]) == ("abcdefgh", "import-test", "d12")
    trainer, system = records(imported.directory, "session")
    assert trainer["config"] == {"depth": 12, "optim": {"lr": 0.02}}
    assert [r["config"] for r in records(imported.directory, "config")] == [{"late": "yes"}]
    assert trainer["tags"] == ["a", "b", "imported:wandb"]
    assert (trainer["group"], trainer["notes"], trainer["host"]) == ("g", "a note", "box")
    assert (trainer["kind"], system["kind"]) == ("trainer", "system")
    rows = [r for r in records(imported.directory, "metrics") if r["session"] == trainer["session"]]
    assert [r["step"] for r in rows] == [*range(11), 100]
    assert [r["values"]["train/loss"] for r in rows[:10]] == [3.0 / (i + 1) for i in range(10)]
    assert rows[9]["values"]["nested/b"] == -9
    assert math.isnan(decode_number(rows[10]["values"]["train/loss"]))
    assert rows[10]["values"]["inf"] == "Infinity"
    assert rows[10]["values"]["flag"] == 1.0
    assert rows[11]["values"] == {"val/bpb": 1.5}
    sample, long = records(imported.directory, "text")[:2]
    assert (sample["step"], sample["text"]) == (11, "Once upon <b>a time</b>")
    assert long["text"] == "x" * 15_000
    histogram, table = records(imported.directory, "table")
    assert (histogram["columns"], len(histogram["rows"])) == (["low", "high", "count"], 64)
    assert sum(row[2] for row in histogram["rows"]) == 3
    assert (table["columns"], table["rows"]) == (["q", "a"], [["1+1", 2], ["x", None]])
    measured = [
        r for r in records(imported.directory, "metrics") if r["session"] != rows[0]["session"]
    ]
    assert measured
    assert all(name.startswith("system/") for r in measured for name in r["values"])
    assert {r["status"] for r in records(imported.directory, "finish")} == {"finished"}
    assert imported.skipped == {"artifact": 1}


def test_sequence_numbers_and_times_are_those_of_a_journal(tmp_path: Path) -> None:
    directory = import_wandb(FILE, tmp_path).directory
    for file in (directory / "journal").iterdir():
        lines = [json.loads(line) for line in file.read_bytes().splitlines()]
        assert [line["seq"] for line in lines] == list(range(len(lines)))
        assert {line["session"] for line in lines} == {file.stem}


def test_a_run_is_imported_once(tmp_path: Path) -> None:
    directory = import_wandb(FILE, tmp_path).directory
    before = {p.name: p.read_bytes() for p in (directory / "journal").iterdir()}
    assert import_wandb(FILE, tmp_path).directory == directory
    assert {p.name: p.read_bytes() for p in (directory / "journal").iterdir()} == before
    again = import_wandb(FILE, tmp_path / "elsewhere").directory
    assert {p.name: p.read_bytes() for p in (again / "journal").iterdir()} == before


def test_a_clock_before_1970_ends_a_run_in_1970(tmp_path: Path) -> None:
    first, logged, last = (wandb_internal_pb2.Record() for _ in range(3))
    first.run.run_id = "abcdefgh"
    logged.history.item.add(key="loss", value_json="1.0")
    logged.history.item.add(key="_timestamp", value_json="-5.0")
    last.exit.exit_code = 0
    content = b":W&B\xee\xbe\0"
    for record in (first, logged, last):
        body = record.SerializeToString()
        checksum = zlib.crc32(body, zlib.crc32(bytes([FULL])))
        content += FRAGMENT.pack(checksum, len(body), FULL) + body
    (tmp_path / "run.wandb").write_bytes(content)
    directory = import_wandb(tmp_path / "run.wandb", tmp_path / "out").directory
    assert [record["time"] for record in records(directory, "finish")] == [0.0]


@pytest.mark.parametrize("cut", [8, 100, 4001, 32_768, 32_775, 33_000])
def test_a_torn_file_is_read_to_where_it_is_whole(tmp_path: Path, cut: int) -> None:
    whole = list(iter_records(FILE))
    torn = tmp_path / "torn.wandb"
    torn.write_bytes(FILE.read_bytes()[:cut])
    some = list(iter_records(torn))
    assert len(some) < len(whole)
    assert some == whole[: len(some)]


def test_a_killed_run_is_interrupted(tmp_path: Path) -> None:
    torn = tmp_path / "torn.wandb"
    torn.write_bytes(FILE.read_bytes()[:4001])
    directory = import_wandb(torn, tmp_path / "out").directory
    assert not records(directory, "finish")  # it may be written still
    assert {session_status(path) for path in session_files(directory)} == {"interrupted"}


def test_a_file_that_has_grown_goes_on_in_its_session(tmp_path: Path) -> None:
    growing = tmp_path / "run.wandb"
    growing.write_bytes(FILE.read_bytes()[:4001])
    directory = import_wandb(growing, tmp_path / "out").directory
    before = {path.name: path.read_bytes() for path in session_files(directory)}
    growing.write_bytes(FILE.read_bytes())
    assert import_wandb(growing, tmp_path / "out").directory == directory
    after = {path.name: path.read_bytes() for path in session_files(directory)}
    assert before
    assert all(after[name].startswith(content) for name, content in before.items())
    assert import_wandb(growing, tmp_path / "new").directory.name == directory.name
    fresh = (tmp_path / "new").rglob("*.jsonl")
    assert {path.name: path.read_bytes() for path in fresh} == after


def test_what_is_whole_around_a_damaged_record_is_kept(tmp_path: Path) -> None:
    whole = list(iter_records(FILE))
    damaged = tmp_path / "damaged.wandb"
    start = FILE.read_bytes().index(b"train/loss")
    for place, lost in ((start, 1), (start + 40, 1)):
        content = bytearray(FILE.read_bytes())
        content[place] ^= 1
        damaged.write_bytes(content)
        skipped: list[str] = []
        assert len(list(iter_records(damaged, skipped.append))) == len(whole) - lost
        assert skipped == ["damaged record"]
    imported = import_wandb(damaged, tmp_path / "out")
    assert imported.skipped["damaged record"] == 1
    assert records(imported.directory, "finish")
    content = bytearray(FILE.read_bytes())
    content[11] ^= 0x80  # a length: the rest of the block is lost, the next is not
    damaged.write_bytes(content)
    assert [c for c in iter_records(damaged) if c == whole[-1]]


def test_a_table_s_path_cannot_leave_the_run(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"columns": ["secret"], "data": [[1]]}')
    run = tmp_path / "run"
    run.mkdir()
    content = FILE.read_bytes()
    inside = b'"media/table/'
    start = content.index(inside)
    while b".table.json" not in content[start : start + 80]:
        start = content.index(inside, start + 1)
    end = content.index(b'"', start + 1) + 1
    head, tail = b'"..', b'../secret.json"'
    evil = head + b"/" * (end - start - len(head) - len(tail)) + tail
    (run / "run-abcdefgh.wandb").write_bytes(_resealed(content.replace(content[start:end], evil)))
    (run / "files").mkdir()
    imported = import_wandb(run / "run-abcdefgh.wandb", tmp_path / "out")
    assert imported.skipped["table-file"] == 1
    assert [table["name"] for table in records(imported.directory, "table")] == ["hist"]


def _resealed(content: bytes) -> bytes:
    """Put right checksums on a changed log."""
    changed, position = bytearray(content), 7
    while position + 7 <= len(changed):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        length, kind = (
            int.from_bytes(changed[position + 4 : position + 6], "little"),
            changed[position + 6],
        )
        body = bytes(changed[position + 7 : position + 7 + length])
        crc = zlib.crc32(body, zlib.crc32(bytes([kind])))
        changed[position : position + 4] = crc.to_bytes(4, "little")
        position += 7 + length
    return bytes(changed)


def test_nothing_to_import_is_said(tmp_path: Path) -> None:
    with pytest.raises(EndlexError, match=r"no \.wandb file"):
        find_runs(tmp_path, tmp_path, None)
    other = tmp_path / "other.wandb"
    other.write_bytes(b"PK\3\4")
    with pytest.raises(EndlexError, match=r"not a \.wandb file"):
        import_wandb(other, tmp_path)
    assert [place for place, _ in find_runs(FIXTURE, tmp_path, None)] == [FILE]
