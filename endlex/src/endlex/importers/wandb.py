"""Read wandb's offline runs (`.wandb` files) into run directories.

A `.wandb` file is a LevelDB log (blocks of 32 KiB, records cut into fragments, each with its CRC)
of messages that wandb's own library decodes. Metrics, summaries, texts, tables, histograms, media,
configuration, tags, notes, group, system statistics and the console are taken; artifacts are
counted. What is whole around a damaged record is kept.

    endlex import wandb wandb/offline-run-20260101_120000-abcdefgh
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from endlex.client.journal import tidy_name
from endlex.importers.run_directory import FoundRuns, RunWriter, find_files, load, numbers_of
from endlex.protocol import CONFIG, CONSOLE, SYSTEM, EndlexError

MAGIC = b":W&B"
HEADER_BYTES = 7
BLOCK_BYTES = 32768
FRAGMENT = struct.Struct("<IHB")  # crc32 of type and content, length, type
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
INTERNAL = ("_wandb", "_step", "_timestamp", "_runtime")
CONSOLE_LINES = 200
"""Most lines of the console per text."""


def find_runs(path: Path, root: Path, project: str | None) -> FoundRuns:
    """Find the `.wandb` files below a directory, or the one that is named."""
    what = ".wandb file: give an offline run's directory (wandb/offline-run-...)"
    files = find_files(path, "*.wandb", what)
    return [(file, partial(import_wandb, file, root, project)) for file in files]


def iter_records(path: Path, skip: Callable[[str], Any] = lambda reason: None) -> Iterator[bytes]:
    """Yield a `.wandb` file's messages; what is torn at its end (a killed run) is passed over.

    `skip` is told of each damaged stretch; the records before and after it are yielded.
    """
    content = path.read_bytes()
    if content[: len(MAGIC)] != MAGIC:
        raise EndlexError(f"{path} is not a .wandb file: it does not begin with {MAGIC.decode()!r}")
    position, parts = HEADER_BYTES, None
    while position + FRAGMENT.size <= len(content):
        room = BLOCK_BYTES - position % BLOCK_BYTES
        if room < FRAGMENT.size or not any(content[position : position + FRAGMENT.size]):
            position += room  # the end of a block, or the zeros of a preallocated one
            continue
        body, kind, end = _fragment(content, position)
        if body is None:
            if end >= len(content):
                return
            skip("damaged record")
            parts = None
            # Its length may be sound: then a whole fragment follows. Else go to the next block.
            position = end if _fragment(content, end)[0] is not None else position + room
            continue
        if kind in (FULL, FIRST):
            parts = body
        elif parts is not None:
            parts += body
        if kind in (FULL, LAST) and parts is not None:
            yield parts
            parts = None
        position = end


def _fragment(content: bytes, position: int) -> tuple[bytes | None, int, int]:
    """Return a fragment's content, None for what is damaged or cut off, its type and its end."""
    start = position + FRAGMENT.size
    if start > len(content):
        return None, 0, start
    checksum, length, kind = FRAGMENT.unpack_from(content, position)
    body, end = content[start : start + length], start + length
    sound = end <= len(content) and zlib.crc32(body, zlib.crc32(bytes([kind]))) == checksum
    return (body if sound and FULL <= kind <= LAST else None), kind, end


def _iter_messages(path: Path, skip: Callable[[str], Any] = lambda reason: None) -> Iterator[Any]:
    messages = load("wandb.proto.wandb_internal_pb2")
    for content in iter_records(path, skip):
        try:
            yield messages.Record.FromString(content)
        except Exception:  # protobuf's own: the record is whole, and none of this library's
            skip("record that wandb's library does not know")


def import_wandb(path: Path, root: Path, project: str | None = None) -> RunWriter:
    """Turn one `.wandb` file into a run directory below `root`; a `project` replaces its own."""
    run, exit_code, times, config = None, None, list[float](), dict[str, Any]()
    for record in _iter_messages(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            _update_config(config, run.config)
        elif kind == "config" and not any(times):
            _update_config(config, record.config)
        elif kind == "exit":
            exit_code = record.exit.exit_code
        elif kind == "history":
            times.append(float(_items(record.history.item).get("_timestamp", 0)))
    config.pop("_wandb", None)
    if run is None:
        raise EndlexError(f"{path} names no run: it was cut off in its first records")
    created = _seconds(run.start_time) or next(filter(None, times), path.stat().st_mtime)
    with RunWriter(
        root,
        tool="wandb",
        identity=f"{run.project}/{run.run_id}",
        project=project or run.project or "uncategorized",
        name=tidy_name(run.display_name, run.run_id),
        created=created,
        config=config,
        tags=tuple(filter(None, (*run.tags, run.job_type))),
        group=tidy_name(run.run_group, "") or None,
        notes=run.notes or None,
        host=run.host,
        run=run.run_id,
        ended="interrupted",
    ) as writer:
        _write_records(path, writer, created, config)
        if exit_code is not None:  # else it was killed, or is still written
            writer.finish(max([0.0, *times, created]), "failed" if exit_code else "finished")
    return writer


def _update_config(config: dict[str, Any], update: Any) -> None:
    for key, value in _items(update.update).items():
        both = isinstance(config.get(key), dict) and isinstance(value, dict)
        config[key] = config[key] | value if both else value
    for key in _items(update.remove):
        config.pop(key, None)


def _write_records(path: Path, writer: RunWriter, created: float, config: dict[str, Any]) -> None:
    last_step, time, logged = -1, created, set[str]()
    summary: dict[str, Any] = {}
    console: list[str] = []
    for record in _iter_messages(path, writer.skip):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            values = _items(record.history.item)
            last_step = int(values.get("_step", record.history.step.num or last_step + 1))
            time = float(values.get("_timestamp", created))
            row = {k: v for k, v in values.items() if k not in INTERNAL}
            logged |= row.keys()
            writer.log((last_step, time), row, path.parent / "files")
        elif kind == "config" and last_step >= 0:
            _update_config(config, record.config)
            if keys := _items(record.config.update).keys() - {"_wandb"}:
                writer.append(CONFIG, time, {"config": {key: config[key] for key in sorted(keys)}})
        elif kind == "summary":
            summary |= _items(record.summary.update)
        elif kind == "stats":
            moment = _seconds(record.stats.timestamp) or created
            at = max(0, round(moment - created)), moment
            writer.metrics(at, numbers_of(_items(record.stats.item), "system/"), SYSTEM)
        elif kind in ("output", "output_raw"):
            console.append(getattr(record, kind).line)
        elif kind == "artifact":
            writer.skip("artifact")
    own = {k: v for k, v in summary.items() if k not in logged and k not in INTERNAL}
    writer.log((max(last_step, 0), time), own, path.parent / "files")
    lines = "".join(console).splitlines()
    for start in range(0, len(lines), CONSOLE_LINES):
        writer.text((start, time), CONSOLE, "\n".join(lines[start : start + CONSOLE_LINES]))


def _items(items: Any) -> dict[str, Any]:
    """Decode key and value pairs; a nested key makes nested mappings."""
    found: dict[str, Any] = {}
    for item in items:
        *above, last = list(getattr(item, "nested_key", ())) or [item.key]
        level = found
        for key in above:
            if not isinstance(level.get(key), dict):
                level[key] = {}
            level = level[key]
        level[last] = _value(item)
    return found


def _value(item: Any) -> Any:
    """Decode a value: JSON in a string, or one of the typed fields of newer writers."""
    fields = type(item).DESCRIPTOR.oneofs_by_name
    kind = item.WhichOneof(next(iter(fields))) if fields else None
    if kind in ("boolean", "integer", "number", "text"):
        return getattr(item, kind)
    if kind == "none":
        return None
    text = item.value_json or getattr(item, "json", "")
    try:
        return json.loads(text)
    except ValueError:
        return text or None


def _seconds(timestamp: Any) -> float:
    return float(timestamp.seconds + timestamp.nanos / 1e9)
