"""TensorBoard's event files, as the real libraries wrote them (make_fixtures.py)."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from endlex.importers.tensorboard import (
    find_event_directories,
    import_tensorboard,
    iter_events,
    masked_crc,
    run_name,
)
from endlex.protocol import EndlexError
from endlex.reading import session_files, session_status

FIXTURE = Path(__file__).parent / "fixtures" / "tensorboard"
FILE = FIXTURE / "torch" / "events.out.tfevents.1.box.1"


def records(directory: Path, kind: str) -> list[dict[str, Any]]:
    (file,) = (directory / "journal").iterdir()
    lines = [json.loads(line) for line in file.read_bytes().splitlines()]
    return [line for line in lines if line["type"] == kind]


def test_scalars_of_both_kinds_and_texts(tmp_path: Path) -> None:
    imported = import_tensorboard(FIXTURE / "torch", tmp_path, "p", "torch")
    rows = records(imported.directory, "metrics")
    assert [row["step"] for row in rows] == list(range(11))
    loss = [struct.unpack("<f", struct.pack("<f", 3.0 / (i + 1)))[0] for i in range(10)]
    assert [row["values"]["train/loss"] for row in rows[:10]] == loss
    assert [row["values"]["lr"] for row in rows[:10]] == [0.25 * i for i in range(10)]
    assert rows[10]["values"] == {"train/loss": "NaN", "double": 1 / 3}
    (text,) = records(imported.directory, "text")
    assert (text["name"], text["step"], text["text"]) == ("sample", 3, "Once upon <b>a</b> time")
    assert imported.skipped == {"histogram": 1}
    assert not records(imported.directory, "finish")  # it may be written still
    assert session_status(session_files(imported.directory)[0]) == "finished"


def test_hyperparameters_become_the_configuration(tmp_path: Path) -> None:
    imported = import_tensorboard(FIXTURE / "torch" / "hp", tmp_path)
    assert records(imported.directory, "session")[0]["config"] == {"lr": 0.1, "opt": "adam"}
    assert records(imported.directory, "metrics")[0]["values"] == {"hp/metric": 1.0}


def test_tensors_of_the_second_version(tmp_path: Path) -> None:
    imported = import_tensorboard(FIXTURE / "tensors", tmp_path, "p")
    values = [row["values"] for row in records(imported.directory, "metrics")]
    assert values == [{"x": step / 2} for step in range(5)]


def test_each_directory_is_a_run_named_by_its_path() -> None:
    found = find_event_directories(FIXTURE)
    assert [run_name(FIXTURE, d) for d in found] == ["tensors", "torch", "torch/hp"]
    assert run_name(FIXTURE / "torch", FIXTURE / "torch") == "torch"


def test_a_torn_file_is_read_to_where_it_is_whole(tmp_path: Path) -> None:
    content = FILE.read_bytes()
    whole = len(list(iter_events(FILE)))
    torn = tmp_path / "events.out.tfevents.torn"
    for cut in range(len(content) - 200, len(content)):
        torn.write_bytes(content[:cut])
        assert whole - 10 < len(list(iter_events(torn))) < whole


@pytest.mark.parametrize("place", [3, 20])
def test_damage_is_told_with_its_place(tmp_path: Path, place: int) -> None:
    content = bytearray(FILE.read_bytes())
    content[place] ^= 1
    damaged = tmp_path / "events.out.tfevents.damaged"
    damaged.write_bytes(content)
    with pytest.raises(EndlexError, match="damaged"):
        import_tensorboard(tmp_path, tmp_path / "out")


def test_checksum_is_the_standard_one() -> None:
    # RFC 3720, B.4: the CRC-32C of 32 zero bytes is 0x8A9136AA; masked as TFRecords do.
    crc = 0x8A9136AA
    assert masked_crc(bytes(32)) == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def test_an_empty_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(EndlexError, match="no event files"):
        find_event_directories(tmp_path)
