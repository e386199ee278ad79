"""Read wandb's offline runs (`.wandb` files) into run directories, without wandb.

A `.wandb` file is a LevelDB log (blocks of 32 KiB, records cut into fragments, each with its CRC)
of protocol-buffer messages; field numbers are those of wandb's published `wandb_internal.proto`.
Metrics, texts, tables, configuration, tags, notes, group and system statistics are taken. Media,
artifacts and console output stay where they are, counted in what `endlex import` prints, and so do
host details such as the command line and the installed packages.

    endlex import wandb wandb/offline-run-20260101_120000-abcdefgh
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from endlex.client.values import tidy_name
from endlex.importers.protobuf import Message
from endlex.importers.run_directory import Imported, RunWriter, Source, flatten
from endlex.protocol import EndlexError

MAGIC = b":W&B"
HEADER_BYTES = 7
BLOCK_BYTES = 32768
FRAGMENT = struct.Struct("<IHB")  # crc32 of type and content, length, type
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
LARGEST_TABLE_FILE = 64 * 2**20

# Field numbers of Record, and of the records in it.
HISTORY, OUTPUT, CONFIG, STATS, ARTIFACT, RUN, EXIT = 2, 4, 5, 7, 8, 17, 18
OUTPUT_RAW = 13
KEY, NESTED_KEY, VALUE_JSON = 1, 2, 16
INTERNAL = ("_wandb", "_step", "_timestamp", "_runtime")


def find_wandb_files(path: Path) -> list[Path]:
    """Return the `.wandb` files below a directory, or the one that is named.

    Raises:
        EndlexError: there is none.
    """
    found = [path] if path.is_file() else sorted(path.rglob("*.wandb"))
    if not found:
        raise EndlexError(
            f"{path} holds no .wandb file: give an offline run's directory (wandb/offline-run-...)"
        )
    return found


def iter_records(path: Path) -> Iterator[bytes]:
    """Yield a `.wandb` file's messages; what is torn at its end (a killed run) is passed over.

    Raises:
        EndlexError: it is no `.wandb` file, or it is damaged before its end.
    """
    content = path.read_bytes()
    if content[: len(MAGIC)] != MAGIC:
        raise EndlexError(f"{path} is not a .wandb file: it does not begin with {MAGIC.decode()!r}")
    position, parts = HEADER_BYTES, b""
    while position + FRAGMENT.size <= len(content):
        room = BLOCK_BYTES - position % BLOCK_BYTES
        if room < FRAGMENT.size:
            position += room
            continue
        checksum, length, kind = FRAGMENT.unpack_from(content, position)
        start = position + FRAGMENT.size
        body = content[start : start + length]
        if len(body) < length or kind == 0:  # torn, or the zeros of a preallocated block
            return
        if kind > LAST or zlib.crc32(body, zlib.crc32(bytes([kind]))) != checksum:
            if start + length >= len(content):
                return
            raise EndlexError(f"{path} is damaged at byte {position:,}: the checksum is wrong")
        parts = body if kind in (FULL, FIRST) else parts + body
        if kind in (FULL, LAST):
            yield parts
        position = start + length


@dataclass
class _Head:
    """What the whole file says about the run, gathered before anything is written."""

    config: dict[str, Any] = field(default_factory=dict)
    run: Message | None = None
    exit_code: int | None = None
    began: float = 0.0
    ended: float = 0.0


def import_wandb(path: Path, root: Path, project: str | None = None) -> Imported:
    """Turn one `.wandb` file into a run directory below `root`.

    Args:
        path: the file.
        root: run directories are made below it.
        project: instead of the run's own.

    Raises:
        EndlexError: the file is damaged or holds no run.
    """
    head = _read_head(path)
    if head.run is None:
        raise EndlexError(f"{path} names no run: it was cut off in its first records")
    run = head.run
    identity = run.string(1)
    created = _timestamp(run.message(17)) or head.began or path.stat().st_mtime
    source = Source(
        tool="wandb",
        identity=f"{run.string(3)}/{identity}",
        project=tidy_name(project or run.string(3), "uncategorized"),
        name=tidy_name(run.string(8), "") or tidy_name(identity, "run"),
        created=created,
        config=head.config,
        tags=tuple(tidy_name(tag, "tag") for tag in run.strings(10)),
        group=tidy_name(run.string(6), "") or None,
        notes=run.string(9) or None,
        host=run.string(13),
        run=identity,
        ended="interrupted",
    )
    with RunWriter(root, source) as writer:
        _write_records(path, writer, created, head.config)
        if head.exit_code is not None:  # else it was killed, or is still written
            writer.finish(max(head.ended, created), "failed" if head.exit_code else "finished")
    return writer.imported


def _read_head(path: Path) -> _Head:
    head = _Head()
    for content in iter_records(path):
        record = Message(content)
        if RUN in record:
            head.run = record.message(RUN)
            _update_config(head.config, head.run.message(4))
        elif CONFIG in record and not head.began:
            _update_config(head.config, record.message(CONFIG))
        elif EXIT in record:
            head.exit_code = record.message(EXIT).integer(1)
        elif HISTORY in record:
            values = _items(record.message(HISTORY).messages(1))
            time = float(values.get("_timestamp", 0))
            head.began, head.ended = head.began or time, max(head.ended, time)
    head.config.pop("_wandb", None)
    return head


def _update_config(config: dict[str, Any], update: Message) -> None:
    changed = _items(update.messages(1))
    config |= {
        key: config[key] | value
        if isinstance(config.get(key), dict) and isinstance(value, dict)
        else value
        for key, value in changed.items()
    }
    for key in _items(update.messages(2)):
        config.pop(key, None)


def _write_records(path: Path, writer: RunWriter, created: float, config: dict[str, Any]) -> None:
    last_step, time = -1, created
    for content in iter_records(path):
        record = Message(content)
        if HISTORY in record:
            history = record.message(HISTORY)
            values = _items(history.messages(1))
            step = values.get("_step", history.message(2).integer(1, last_step + 1))
            last_step = int(step)
            time = float(values.get("_timestamp", created))
            shown = {k: v for k, v in values.items() if k not in INTERNAL}
            _write_row(path, writer, last_step, time, shown)
        elif CONFIG in record and last_step >= 0:
            _update_config(config, record.message(CONFIG))
            keys = _items(record.message(CONFIG).messages(1)).keys() - {"_wandb"}
            if keys:
                writer.config(time, {key: config[key] for key in sorted(keys)})
        elif STATS in record:
            stats = record.message(STATS)
            moment = _timestamp(stats.message(2)) or created
            names = _items(stats.messages(3))
            numbers = {f"system/{k}": v for k, v in flatten(names).items() if _is_number(v)}
            writer.metrics(max(0, round(moment - created)), moment, numbers, system=True)
        elif ARTIFACT in record:
            writer.skip("artifact")
        elif OUTPUT in record or OUTPUT_RAW in record:
            writer.skip("line of console output")


def _write_row(path: Path, writer: RunWriter, step: int, time: float, row: dict[str, Any]) -> None:
    """Write one call of wandb.log: numbers together, texts and tables one by one."""
    numbers: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping) and "_type" in value:
            _write_media(path, writer, step, time, name, value)
        elif isinstance(value, Mapping):
            nested = flatten(value, f"{name}/")
            numbers |= {key: item for key, item in nested.items() if _is_number(item)}
        elif isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity"):
            writer.text(step, time, name, value)
        elif isinstance(value, str):
            numbers[name] = float(value)
        elif _is_number(value):
            numbers[name] = value
        elif value is not None:
            writer.skip(f"value of type {type(value).__name__}")
    writer.metrics(step, time, numbers)


def _write_media(
    path: Path, writer: RunWriter, step: int, time: float, name: str, value: Mapping[str, Any]
) -> None:
    """Write a table from the file that it is kept in; count other media."""
    kind = str(value["_type"])
    table = _read_table(path.parent / "files", str(value.get("path", "")))
    if "table" not in kind or table is None:
        writer.skip(kind)
        return
    writer.table(step, time, name, [str(c) for c in table["columns"]], table["data"])


def _read_table(files: Path, relative: str) -> dict[str, Any] | None:
    """Read a table's file; None where there is none, or its path leads out of the run."""
    target = (files / relative).resolve()
    if not relative or not target.is_relative_to(files.resolve()) or not target.is_file():
        return None
    if target.stat().st_size > LARGEST_TABLE_FILE:
        return None
    try:
        table = json.loads(target.read_bytes())
    except ValueError:
        return None
    whole = isinstance(table, dict) and all(
        isinstance(table.get(k), list) for k in ("columns", "data")
    )
    return table if whole else None


def _items(items: list[Message]) -> dict[str, Any]:
    """Decode key and value pairs; a nested key makes nested mappings."""
    found: dict[str, Any] = {}
    for item in items:
        keys = item.strings(NESTED_KEY) or [item.string(KEY)]
        level = found
        for key in keys[:-1]:
            deeper = level.get(key)
            if not isinstance(deeper, dict):
                deeper = level[key] = {}
            level = deeper
        level[keys[-1]] = _value(item)
    return found


def _value(item: Message) -> Any:
    """Decode a value: JSON in a string, or one of the typed fields of newer writers."""
    if VALUE_JSON not in item:
        if 4 in item:
            return bool(item.integer(4))
        if 5 in item:  # sint64: zigzag
            raw = item.integer(5) & (2**64 - 1)
            return (raw >> 1) ^ -(raw & 1)
        if 6 in item:
            return item.floats(6, "d")[-1]
        if 7 in item:
            return item.string(7)
        if 8 not in item:
            return None
    text = item.string(VALUE_JSON) or item.string(8)
    try:
        return json.loads(text)
    except ValueError:
        return text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _timestamp(message: Message) -> float:
    return message.integer(1) + message.integer(2) / 1e9
