"""TensorBoard's event files, as the real libraries wrote them (make_fixtures.py)."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorboard", reason="the importers need the extra endlex[import]")

from endlex.importers.tensorboard import find_runs, import_tensorboard, iter_events
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
    (histogram,) = records(imported.directory, "table")
    assert sum(row[2] for row in histogram["rows"]) == 10
    assert imported.skipped == {}
    assert not records(imported.directory, "finish")  # it may be written still
    assert session_status(session_files(imported.directory)[0]) == "finished"


def test_hyperparameters_become_the_configuration(tmp_path: Path) -> None:
    imported = import_tensorboard(FIXTURE / "torch" / "hp", tmp_path, "p", "hp")
    assert records(imported.directory, "session")[0]["config"] == {"lr": 0.1, "opt": "adam"}
    assert records(imported.directory, "metrics")[0]["values"] == {"hp/metric": 1.0}


def test_tensors_of_the_second_version(tmp_path: Path) -> None:
    imported = import_tensorboard(FIXTURE / "tensors", tmp_path, "p", "tensors")
    values = [row["values"] for row in records(imported.directory, "metrics")]
    assert values == [{"x": step / 2} for step in range(5)]


def test_each_directory_is_a_run_named_by_its_path(tmp_path: Path) -> None:
    def names(top: Path) -> list[str]:
        runs: list[Any] = [import_one() for _, import_one in find_runs(top, tmp_path, None)]
        return [run.name for run in runs]

    assert names(FIXTURE) == ["tensors", "torch", "torch/hp"]
    assert names(FIXTURE / "torch") == ["torch", "hp"]


def test_a_torn_file_is_read_to_where_it_is_whole(tmp_path: Path) -> None:
    content = FILE.read_bytes()
    whole = len(list(iter_events(FILE)))
    torn = tmp_path / "events.out.tfevents.torn"
    for cut in range(len(content) - 200, len(content)):
        torn.write_bytes(content[:cut])
        assert whole - 10 < len(list(iter_events(torn))) < whole


@pytest.mark.parametrize("inside", [3, 9, 20])
def test_what_is_whole_around_a_damaged_record_is_kept(tmp_path: Path, inside: int) -> None:
    """Of the third record: a byte of its length, of that's checksum, of its content."""
    content, whole, start = bytearray(FILE.read_bytes()), list(iter_events(FILE)), 0
    for _ in range(2):
        start += int.from_bytes(content[start : start + 8], "little") + 16
    content[start + inside] ^= 1
    damaged = tmp_path / "events.out.tfevents.damaged"
    damaged.write_bytes(content)
    skipped: list[str] = []
    found = list(iter_events(damaged, skipped.append))
    assert found == whole[:2] + whole[3:]
    assert skipped == ["damaged record"]
    assert import_tensorboard(tmp_path, tmp_path / "out", "p", "n").skipped["damaged record"] == 1


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.other").write_bytes(b"PK\3\4" * 50)
    with pytest.raises(EndlexError, match="not an event file"):
        import_tensorboard(tmp_path, tmp_path / "out", "p", "n")


def write_event(directory: Path, value: Any) -> None:
    """Write an event file with one value."""
    summary = pytest.importorskip("tensorboard.compat.proto.summary_pb2")
    event = pytest.importorskip("tensorboard.compat.proto.event_pb2")
    checksum = pytest.importorskip("tensorboard.compat.tensorflow_stub.pywrap_tensorflow")
    body = event.Event(step=3, wall_time=2.0, summary=summary.Summary(value=[value]))
    content = body.SerializeToString()
    head = len(content).to_bytes(8, "little")
    record = [head, checksum.masked_crc32c(head).to_bytes(4, "little"), content]
    record.append(checksum.masked_crc32c(content).to_bytes(4, "little"))
    (directory / "events.out.tfevents.1").write_bytes(b"".join(record))


def test_hyperparameters_have_an_order_so_that_a_second_import_is_the_same(tmp_path: Path) -> None:
    summary = pytest.importorskip("tensorboard.compat.proto.summary_pb2")
    plugin = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    data, value = plugin.HParamsPluginData(), summary.Summary.Value(tag="hparams")
    for key in "hcagebfd":
        data.session_start_info.hparams[key].number_value = 1.0
    value.metadata.plugin_data.plugin_name = "hparams"
    value.metadata.plugin_data.content = data.SerializeToString()
    write_event(tmp_path, value)
    imported = import_tensorboard(tmp_path, tmp_path / "out", "p", "n")
    assert "".join(records(imported.directory, "session")[0]["config"]) == "abcdefgh"


def test_images_are_files(tmp_path: Path) -> None:
    summary = pytest.importorskip("tensorboard.compat.proto.summary_pb2")
    value = summary.Summary.Value(tag="sample")
    value.image.encoded_image_string = b"\x89PNG"
    write_event(tmp_path, value)
    imported = import_tensorboard(tmp_path, tmp_path / "out", "p", "n")
    (media,) = records(imported.directory, "media")
    assert (media["name"], media["step"], media["mime"]) == ("sample", 3, "image/png")
    assert len(list((imported.directory / "media").iterdir())) == 1


def test_an_empty_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(EndlexError, match="no event files"):
        find_runs(tmp_path, tmp_path, None)
