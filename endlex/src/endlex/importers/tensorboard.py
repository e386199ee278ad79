"""Read TensorBoard event files into run directories, with TensorBoard's own messages.

An event file is a sequence of TFRecords (length, masked CRC-32C of the length, content, masked
CRC-32C of the content). Scalars, texts, images, audio, histograms and the hyperparameters of the
hparams plugin are taken; graphs and the like are counted. What is whole around a damaged record is
kept. Each directory that holds event files is one run, as TensorBoard itself has it.

    endlex import tensorboard runs/
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from endlex.client.journal import tidy_name
from endlex.client.log import HISTOGRAM
from endlex.importers.run_directory import FoundRuns, Moment, RunWriter, find_files, load
from endlex.protocol import EndlexError, UsageError

HEAD = struct.Struct("<QI")
LARGEST_CHECKED = 2**20
"""Contents above this are images or graphs: their checksum takes too long in Python."""
FAILED = 2
"""The hparams plugin's word for a run that failed."""


def find_runs(path: Path, root: Path, project: str | None) -> FoundRuns:
    """Find the directories with event files; each is a run, named by its path below `path`."""
    if path.is_file():
        raise UsageError(f"{path} is a file: give the directory that holds the event files")
    files = find_files(path, "*tfevents*", "event files (events.out.tfevents...)")
    top, found = path.resolve().name, FoundRuns()
    for place in sorted({file.parent for file in files}):
        name = "/".join(place.relative_to(path).parts) or top
        found.append((place, partial(import_tensorboard, place, root, project or top, name)))
    return found


def iter_events(path: Path, skip: Callable[[str], Any] = lambda reason: None) -> Iterator[Any]:
    """Yield a file's events; what is torn at its end (a killed run) is passed over.

    `skip` is told of each damaged stretch; the events before and after it are yielded.
    """
    event = load("tensorboard.compat.proto.event_pb2").Event
    checksum = load("tensorboard.compat.tensorflow_stub.pywrap_tensorflow").masked_crc32c
    content, position = path.read_bytes(), 0
    while position + HEAD.size <= len(content):
        length, crc = HEAD.unpack_from(content, position)
        if checksum(content[position : position + 8]) != crc:
            found = _next_head(content, position + 1, checksum)
            if found is None and position == 0:
                raise EndlexError(f"{path} is not an event file, or damaged from its start")
            if any(content[position:found]):
                skip("damaged end" if found is None else "damaged record")
            position = len(content) if found is None else found
            continue
        start = position + HEAD.size
        position = start + length + 4
        if position > len(content):
            return
        body, crc = content[start : start + length], content[position - 4 : position]
        try:
            if length <= LARGEST_CHECKED and checksum(body) != int.from_bytes(crc, "little"):
                raise ValueError("not the content that was written")
            yield event.FromString(body)
        except Exception:  # protobuf's own, too
            if position < len(content):  # else the last record, written in part over zeros
                skip("damaged record")


def _next_head(content: bytes, position: int, checksum: Callable[[bytes], int]) -> int | None:
    """Return where the next sound record begins: no record is as long as 2**32 bytes."""
    while (zeros := content.find(bytes(4), position + 4)) >= 0:
        position = zeros - 4
        head = content[position : position + HEAD.size]
        if len(head) == HEAD.size and checksum(head[:8]) == HEAD.unpack(head)[1]:
            return position
        position += 1
    return None


def import_tensorboard(directory: Path, root: Path, project: str, name: str) -> RunWriter:
    """Turn the event files of one directory, not those below it, into a run directory."""
    files = sorted(file for file in directory.glob("*tfevents*") if file.is_file())
    config, times, has_failed = dict[str, Any](), [0.0], False
    hparams = load("tensorboard.plugins.hparams.plugin_data_pb2").HParamsPluginData
    for event in chain.from_iterable(map(iter_events, files)):
        times = [min(times[0] or event.wall_time, event.wall_time), max(times[-1], event.wall_time)]
        for plugin in (value.metadata.plugin_data for value in event.summary.value):
            if plugin.plugin_name == "hparams":
                data = hparams.FromString(plugin.content)
                for key, value in sorted(data.session_start_info.hparams.items()):  # else any order
                    kind = value.WhichOneof("kind")
                    config[key] = None if kind in (None, "null_value") else getattr(value, kind)
                has_failed |= data.session_end_info.status == FAILED
    project, name = tidy_name(project, "tensorboard"), tidy_name(name, "run")
    with RunWriter(
        root,
        tool="tensorboard",
        identity=f"{project}/{name}/{times[0]!r}",
        project=project,
        name=name,
        created=times[0],
        config=config,
    ) as writer:
        for file in files:
            _write_file(file, writer)
        if has_failed:
            writer.finish(times[-1], "failed")
    return writer


def _write_file(path: Path, writer: RunWriter) -> None:
    """Write a file's values; successive scalars of one step become one record."""
    at, waiting = (-1, 0.0), dict[str, float]()
    make_ndarray = load("tensorboard.util.tensor_util").make_ndarray
    for event in iter_events(path, writer.skip):
        for value in event.summary.value:
            array = make_ndarray(value.tensor) if value.HasField("tensor") else None
            number = _scalar(value, array)
            if number is None:
                _write_other(value, array, (event.step, event.wall_time), writer)
                continue
            if event.step != at[0] or value.tag in waiting:
                writer.metrics(at, waiting)
                at, waiting = (event.step, event.wall_time), {}
            waiting[value.tag] = number
    writer.metrics(at, waiting)


def _scalar(value: Any, array: Any) -> float | None:
    if value.HasField("simple_value"):
        return float(value.simple_value)
    is_other = value.metadata.plugin_data.plugin_name not in ("scalars", "")
    if is_other or array is None or array.size != 1 or array.dtype.kind not in "fiub":
        return None
    return float(array.item())


def _write_other(value: Any, array: Any, at: Moment, writer: RunWriter) -> None:
    """Write a text, a histogram, an image or a sound, in its old form or as a tensor."""
    name, kind = value.tag, value.WhichOneof("value")
    items = [] if array is None else array.ravel().tolist()
    match kind, value.metadata.plugin_data.plugin_name:
        case "histo", _:
            limits, counts = list(value.histo.bucket_limit), list(value.histo.bucket)
            lows = [min(value.histo.min, limits[0] if limits else 0.0), *limits]
            rows = [list(row) for row in zip(lows, limits, counts, strict=False) if row[2]]
            writer.table(at, name, HISTOGRAM, rows)
        case "image", _:
            writer.media(at, name, value.image.encoded_image_string, "image/png")
        case "audio", _:
            writer.media(at, name, value.audio.encoded_audio_string, "audio/wav")
        case "tensor", "histograms" if array.ndim == 2:
            writer.table(at, name, HISTOGRAM, array.tolist())
        case "tensor", "text":
            text = "\n".join(part.decode("utf-8", "replace") for part in items)
            writer.text(at, name.removesuffix("/text_summary"), text)
        case "tensor", "images":
            for item in items[2:]:  # after width and height
                writer.media(at, name, item, "image/png")
        case "tensor", "audio":
            for item in items[::2]:  # each is followed by its label
                writer.media(at, name, item, "audio/wav")
        case _, plugin if plugin != "hparams" and (plugin or kind == "tensor"):
            writer.skip(plugin or "tensor")
