"""Read TensorBoard event files into run directories, without TensorBoard.

An event file is a sequence of TFRecords (length, masked CRC-32C of the length, content, masked
CRC-32C of the content), each an `Event` protocol-buffer message; field numbers are those of
TensorFlow's published event.proto, summary.proto and tensor.proto. Scalars (old `simple_value`
and new tensors), texts and the hyperparameters of the hparams plugin are taken; images, audio,
histograms and graphs are counted in what `endlex import` prints.

Each directory that holds event files is one run, as TensorBoard itself has it.

    endlex import tensorboard runs/
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from endlex.client.values import tidy_name
from endlex.importers.protobuf import Message
from endlex.importers.run_directory import Imported, RunWriter, Source
from endlex.protocol import EndlexError

LARGEST_EVENT = 2**30
LARGEST_CHECKED = 2**20
"""Contents above this are images or graphs, which are not taken: their checksum is not computed."""

# Tensor types that a scalar or a text has: the number in DataType, where its values are.
STRUCT_OF_TYPE = {1: "f", 2: "d", 3: "i", 4: "B", 5: "h", 6: "b", 9: "q", 10: "?", 19: "e"}
STRUCT_OF_TYPE |= {22: "I", 23: "Q"}
BFLOAT16 = 14
STRING = 7
INTEGER_FIELDS = {3: 7, 4: 7, 5: 7, 6: 7, 9: 10, 10: 11, 22: 16, 23: 17}


def find_event_directories(path: Path) -> list[Path]:
    """Return the directories at or below `path` that hold event files.

    Raises:
        EndlexError: there is none.
    """
    found = {file.parent for file in path.rglob("*tfevents*") if file.is_file()}
    if not found:
        raise EndlexError(f"{path} holds no event files (events.out.tfevents...)")
    return sorted(found)


def iter_events(path: Path) -> Iterator[Message]:
    """Yield a file's events; what is torn at its end (a killed run) is passed over.

    Raises:
        EndlexError: it is no event file, or it is damaged before its end.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        position = 0
        while len(head := file.read(12)) == 12:
            length, length_crc = struct.unpack("<QI", head)
            if masked_crc(head[:8]) != length_crc or length > LARGEST_EVENT:
                raise EndlexError(
                    f"{path} is damaged at byte {position:,}, or it is not an event file"
                )
            body = file.read(length + 4)
            if len(body) < length + 4:
                return
            content, position = body[:length], position + length + 16
            if length <= LARGEST_CHECKED:
                (crc,) = struct.unpack("<I", body[length:])
                if masked_crc(content) != crc:
                    if position >= size:  # the last record, written in part over zeros
                        return
                    raise EndlexError(f"{path} is damaged before byte {position:,}: wrong checksum")
            yield Message(content)


@cache
def _crc_table() -> tuple[int, ...]:
    """The byte table of CRC-32C (Castagnoli), reflected polynomial 0x82F63B78."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


def masked_crc(content: bytes) -> int:
    """Return the CRC-32C of `content`, rotated and shifted as TFRecords store it."""
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in content:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@dataclass
class _Contents:
    """What the files of one directory say, in the order of their names and records."""

    created: float = 0.0
    ended: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    failed: bool = False


def import_tensorboard(
    directory: Path, root: Path, project: str | None = None, name: str | None = None
) -> Imported:
    """Turn the event files of one directory into a run directory below `root`.

    Args:
        directory: the one that holds the files; what is below it is not looked at.
        root: run directories are made below it.
        project: the project's name; the parent directory's without it.
        name: the run's; the directory's without it.

    Raises:
        EndlexError: a file is damaged.
    """
    files = sorted(file for file in directory.glob("*tfevents*") if file.is_file())
    contents = _read_contents(files)
    place = directory.resolve()
    project = tidy_name(project or place.parent.name, "tensorboard")
    name = tidy_name(name or place.name, "run")
    source = Source(
        tool="tensorboard",
        identity=f"{project}/{name}/{contents.created!r}",
        project=project,
        name=name,
        created=contents.created,
        config=contents.config,
    )
    with RunWriter(root, source) as writer:
        for file in files:
            _write_file(file, writer)
        if contents.failed:
            writer.finish(contents.ended, "failed")
    return writer.imported


def _read_contents(files: Iterable[Path]) -> _Contents:
    contents = _Contents()
    for file in files:
        for event in iter_events(file):
            time = (event.floats(1, "d") or [0.0])[-1]
            contents.created = min(contents.created or time, time)
            contents.ended = max(contents.ended, time)
            for value in event.message(5).messages(1):
                _read_hparams(value, contents)
    return contents


def _plugin(value: Message) -> Message:
    return value.message(9).message(1)


def _read_hparams(value: Message, contents: _Contents) -> None:
    """Take the configuration and the status that the hparams plugin keeps in metadata."""
    plugin = _plugin(value)
    if plugin.string(1) != "hparams":
        return
    for content in plugin.contents(2)[-1:]:
        data = Message(content)
        for entry in data.message(3).messages(1):
            contents.config[entry.string(1)] = _hparam(entry.message(2))
        contents.failed = contents.failed or data.message(4).integer(1) == 2


def _hparam(value: Message) -> Any:
    """Decode a `google.protobuf.Value`."""
    if 2 in value:
        return value.floats(2, "d")[-1]
    if 4 in value:
        return bool(value.integer(4))
    return value.string(3) if 3 in value else None


def _write_file(path: Path, writer: RunWriter) -> None:
    """Write a file's values; successive scalars of one step become one record."""
    step, time, waiting = -1, 0.0, dict[str, float]()
    for event in iter_events(path):
        event_step = event.integer(2)
        event_time = (event.floats(1, "d") or [0.0])[-1]
        for value in event.message(5).messages(1):
            tag = value.string(1)
            read = _read_value(value)
            if isinstance(read, float):
                if event_step != step or tag in waiting:
                    writer.metrics(step, time, waiting)
                    step, time, waiting = event_step, event_time, {}
                waiting[tag] = read
            elif isinstance(read, list):
                text = "\n".join(part.decode("utf-8", "replace") for part in read)
                writer.text(event_step, event_time, tag.removesuffix("/text_summary"), text)
            elif read:
                writer.skip(read)
    writer.metrics(step, time, waiting)


def _read_value(value: Message) -> float | list[bytes] | str:
    """Return a scalar, a text's parts, or what kind of value it is that is not taken."""
    plugin = _plugin(value).string(1)
    if 2 in value:
        return value.floats(2, "f")[-1]
    for number, kind in ((4, "image"), (5, "histogram"), (6, "audio")):
        if number in value:
            return kind
    if 8 not in value or plugin == "hparams":
        return ""
    tensor = value.message(8)
    if plugin == "text" and tensor.integer(1) == STRING:
        return tensor.contents(8)
    numbers = _numbers(tensor) if plugin in ("scalars", "") else []
    return numbers[0] if len(numbers) == 1 else (plugin or "tensor")


def _numbers(tensor: Message) -> list[float]:
    """Return a tensor's values, wherever its writer put them."""
    kind = tensor.integer(1)
    raw = b"".join(tensor.contents(4))
    if raw and kind == BFLOAT16:
        return [struct.unpack("<f", b"\0\0" + raw[i : i + 2])[0] for i in range(0, len(raw) - 1, 2)]
    if raw and kind in STRUCT_OF_TYPE:
        form = struct.Struct("<" + STRUCT_OF_TYPE[kind])
        return [float(form.unpack_from(raw, i)[0]) for i in range(0, len(raw), form.size)]
    if kind == 1:
        return tensor.floats(5, "f")
    if kind == 2:
        return tensor.floats(6, "d")
    if kind in (19, BFLOAT16):  # 16 bits in an integer field
        return [
            struct.unpack("<e", struct.pack("<H", bits))[0]
            if kind == 19
            else struct.unpack("<f", struct.pack("<I", bits << 16))[0]
            for bits in tensor.integers(13)
        ]
    return [float(number) for number in tensor.integers(INTEGER_FIELDS.get(kind, 0))]


def run_name(top: Path, directory: Path) -> str:
    """Name a directory's run as TensorBoard does: its path below the directory that was given."""
    relative = os.path.relpath(directory, top)
    return directory.resolve().name if relative == "." else relative.replace(os.sep, "/")
