"""What a trainer logs, step by step: metrics, texts, tables, pictures, alerts.

A logged file's parts are kept below `media`, by hash, until they are sent; equal files are kept and
sent once. Figures and arrays become PNG images: of matplotlib, PIL, plotly (with kaleido), NumPy,
torch and what else `numpy.asarray` takes.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

from endlex import protocol
from endlex.client.journal import Journal, as_list, as_number, tidy_name
from endlex.client.process import warn, write_whole
from endlex.protocol import MAX_STEP, MAX_TEXT_CHARS, MEDIA, METRICS, EndlexError
from endlex.reading import last_step

HISTOGRAM = ["low", "high", "count"]  # columns of the tables that hold histograms
PNG, OTHER = "image/png", "application/octet-stream"
SAME_ALERT_SECONDS = 60.0
WATCH_SECONDS = 60.0  # how often `log` looks whether the shipper still lives


class Log:
    """The calls of a run that record; nothing that is logged stops the trainer.

    What cannot be recorded is left out, with one warning per name, and counted in `refused`. When
    strict, it raises an `EndlexError` instead.
    """

    def __init__(self, journal: Journal | None, name: str, strict: bool) -> None:
        self.directory, self.name = None if journal is None else journal.directory, name
        self.disabled = journal is None  # by `mode`, or because another rank records
        self.session = "" if journal is None else journal.session  # its id, unlike any other's
        self.refused = Counter[str]()  # how often something was not recorded as it was, by name
        self._journal, self._strict, self._finished = journal, strict, False
        self._key = cache(self._check_key)
        self._last_step: int | None = None
        self._next_watch = math.inf
        self._alerts = dict[str, float]()

    def log(
        self, values: Mapping[str, Any], *, step: int | None = None, commit: bool | None = None
    ) -> None:
        """Record metrics of one step; a later value of the same metric and step replaces it.

        Args:
            values: by metric name; anything that `float` takes (an array of one element too), NaN
                and infinities included, but not text. A mapping in place of a value is a prefix:
                `{"train": {"loss": 1.0}}` is "train/loss".
            step: counts from 0; one more than the last one if not given.
            commit: False leaves the step open: the next call without a step is of the same one.
        """
        journal, key = self._journal, self._key
        if journal is None or self._is_over():
            return
        members: list[str] = []
        try:
            for name, value in values.items():
                if type(value) is float and -math.inf < value < math.inf:
                    members.append(key(name) + repr(value))
                else:
                    members += self._encode(name, value)
            with journal.lock:
                number = self._number(step)
                self._last_step = number - 1 if commit is False else number
                content = f',"step":{number},"values":{{{",".join(members)}}}'
                journal.append_members(METRICS, content)
        except (AttributeError, EndlexError, OSError) as error:
            self._refuse("log", error)  # no mapping, too much at once, or a disk that stays full
        if time.monotonic() > self._next_watch:
            self._watch_shipper()

    def _encode(self, name: str, value: Any) -> list[str]:
        """Return the JSON members that a metric's value is: one, those of a mapping, or none."""
        if isinstance(value, Mapping):
            return [m for key, v in value.items() for m in self._encode(f"{name}/{key}", v)]
        try:
            number = protocol.encode_number(as_number(value))
        except Exception:  # whatever some library's tensor raises
            fault = EndlexError(f"metric {name!r} is {value!r:.80}, which is no number")
            self._refuse(str(name), fault)
            return []
        return [self._key(name) + (f'"{number}"' if isinstance(number, str) else repr(number))]

    def _check_key(self, name: str) -> str:
        """Return the JSON of a metric's key, `"train/loss":`."""
        return json.dumps(self._accept(name, "metric name"), ensure_ascii=False) + ":"

    def _accept(self, name: Any, what: str) -> str:
        """Return a name, or the nearest good one."""
        try:
            return protocol.check_name(name, what)
        except EndlexError as error:
            good = tidy_name(name, "unnamed")
            self._refuse(str(name), EndlexError(f"{error}; it is recorded as {good!r}"))
            return good

    def log_text(self, name: str, text: str, *, step: int | None = None) -> None:
        """Record a text of one step, such as a sample; one that is too long is cut."""
        text = str(text)
        if len(text) > MAX_TEXT_CHARS:
            message = f"text {name!r} has {len(text):,} characters: the first {MAX_TEXT_CHARS:,}"
            self._refuse(name, EndlexError(f"{message} are kept"))
        self._record(protocol.TEXT, name, step, lambda _: {"text": text[:MAX_TEXT_CHARS]})

    def log_table(
        self,
        name: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        *,
        step: int | None = None,
    ) -> None:
        """Record a table of one step, such as scores by task.

        Args:
            rows: one value per column; what JSON cannot hold is kept as its `str`. Rows of another
                length are left out.
        """

        def content(_: Path) -> dict[str, Any]:
            kept, names = [], [str(column) for column in as_list(columns)]
            for number, row in enumerate(map(list, rows)):
                if len(row) == len(names):
                    kept.append(row)
                else:
                    has = f"has {len(row)} values for {len(names)} columns"
                    self._refuse(name, EndlexError(f"row {number} of table {name!r} {has}"))
            return {"columns": names, "rows": kept}

        self._record(protocol.TABLE, name, step, content)

    def log_histogram(
        self,
        name: str,
        values: Any,
        *,
        bins: int = 64,
        edges: Sequence[float] | None = None,
        step: int | None = None,
    ) -> None:
        """Record how values are distributed, as a table of low, high and count.

        The values are numbers in any shape; or counts, where `edges` (one more) are given.
        """
        self._record(protocol.TABLE, name, step, lambda _: count_values(values, bins, edges))

    def log_image(
        self, name: str, image: Any, *, step: int | None = None, caption: str | None = None
    ) -> None:
        """Record a picture of one step.

        Args:
            image: a path, a PIL image, a figure of matplotlib or plotly, or an array: [H, W] or
                [H, W, 1, 3 or 4], uint8, or floats from 0 to 1; [3, H, W] as torch has it, too.
        """
        self._record(MEDIA, name, step, lambda at: keep_media(at, *encode_image(image), caption))

    def log_file(
        self, name: str, path: Path | str, *, step: int | None = None, caption: str | None = None
    ) -> None:
        """Record a file of one step; its suffix says what it is: audio, video, an image."""
        self._record(MEDIA, name, step, lambda at: keep_media(at, *read_file(path), caption))

    def _record(
        self, kind: str, name: str, step: int | None, content: Callable[[Path], dict[str, Any]]
    ) -> None:
        """Record something of a name and a step; `content` is given the run's directory."""
        if self._journal is None or self._is_over():
            return
        try:
            head = {"step": self._number(step, after=0), "name": self._accept(name, f"{kind} name")}
            self._journal.append(kind, head | content(self._journal.directory))
        except Exception as error:  # whatever some library's figure raises
            self._refuse(name, error)

    def alert(
        self, title: str, text: str = "", level: Literal["info", "warning", "error"] = "warning"
    ) -> None:
        """Raise an alert, which the server sends on; the same title within a minute counts once."""
        if self._journal is None or self._is_over():
            return
        now = time.monotonic()
        if now < self._alerts.get(title, -math.inf) + SAME_ALERT_SECONDS:
            return
        self._alerts[title] = now
        try:
            if level not in protocol.LEVELS:
                raise EndlexError(f"level {level!r} must be one of {', '.join(protocol.LEVELS)}")
            title = protocol.check_name(title, "title")
            content = {"title": title, "text": str(text)[:MAX_TEXT_CHARS], "level": level}
            self._journal.append(protocol.ALERT, content)
        except (EndlexError, OSError) as error:
            self._refuse("alert", error)

    def _number(self, step: Any, after: int = 1) -> int:
        """Return the step as a number; without a good one, that many `after` the last one."""
        if type(step) is int and 0 <= step <= MAX_STEP:
            return step
        with suppress(Exception):  # whatever some library's tensor raises
            whole = int(step)  # first: some tensors cannot be compared with 2**62
            if 0 <= whole <= MAX_STEP and whole == step and not isinstance(step, bool):
                return whole
        latest = self._last_step  # here, or else in a session before this one
        if latest is None:
            latest = last_step(self.directory) if self.directory is not None else -1
        following = min(max(latest + after, 0), MAX_STEP)
        if step is not None:
            wrong = f"step is {step!r:.80}; it must be a whole number from 0 to 2**62"
            self._refuse("step", EndlexError(f"{wrong}; recorded as step {following}"))
        return following

    def _watch_shipper(self, begin: bool = False) -> None:
        """Start another shipper if this run's was killed; asking costs a few system calls."""
        from endlex.client.shipper.control import restart_shipper_if_killed, start_shipper

        self._next_watch = time.monotonic() + WATCH_SECONDS
        if self._journal is None or self._journal.inherited:
            return
        try:
            (start_shipper if begin else restart_shipper_if_killed)(self._journal.directory)
        except (OSError, ValueError) as error:
            warn(f"the shipper does not start ({error})")

    def _refuse(self, name: str, error: Exception) -> None:
        """Count what cannot be recorded as it is, and say so once per name, or raise if strict."""
        if self._strict:
            raise error if isinstance(error, EndlexError | OSError) else EndlexError(f"{error}")
        self.refused[name] += 1
        if self.refused[name] == 1:
            warn(str(error))

    def _is_over(self) -> bool:
        """Whether the run is finished; logging to it counts as a fault."""
        if self._finished:
            self._refuse("log", self._is_finished())
        return self._finished

    def _is_finished(self) -> EndlexError:
        return EndlexError(f"run {self.name!r} is finished: call endlex.init again to resume it")


def keep_media(directory: Path, content: bytes, mime: str, caption: str | None) -> dict[str, Any]:
    """Keep a file in a run's directory until it is sent; return what the journal says of it."""
    import hashlib

    parts = list[protocol.Part]()
    for start in range(0, len(content), protocol.PART_BYTES):
        part = content[start : start + protocol.PART_BYTES]
        digest = hashlib.sha256(part).hexdigest()
        parts.append({"sha256": digest, "bytes": len(part)})
        path = directory / protocol.MEDIA_DIR / digest
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_whole(path, part)
    kind = mime.partition("/")[0]
    kind = kind if kind in ("image", "audio", "video") else "file"
    return {"kind": kind, "mime": mime, "bytes": len(content), "parts": parts, "caption": caption}


def read_file(path: Path | str) -> tuple[bytes, str]:
    """Return a file's content, and its type by its name."""
    import mimetypes

    return Path(path).read_bytes(), mimetypes.guess_type(str(path))[0] or OTHER


def encode_image(image: Any) -> tuple[bytes, str]:
    """Return a picture's content and type; an `EndlexError` for what `log_image` does not take."""
    if isinstance(image, str | Path):
        return read_file(image)
    buffer = io.BytesIO()
    figure: Any = image if hasattr(image, "savefig") else getattr(image, "figure", None)
    if figure is not None and hasattr(figure, "savefig"):  # of matplotlib, or its axes
        figure.savefig(buffer, format="png")
    elif hasattr(image, "to_image") and hasattr(image, "to_json"):  # of plotly
        try:
            buffer.write(image.to_image(format="png"))
        except Exception:  # no kaleido here, or no browser for it: the figure's data is kept
            return image.to_json().encode(), "application/vnd.plotly.v1+json"
    elif hasattr(image, "save") and hasattr(image, "mode"):  # of PIL
        image.save(buffer, format="PNG")
    else:
        return _encode_array(as_array(image)), PNG
    return buffer.getvalue(), PNG


def as_array(value: Any) -> Any:
    """Return numbers as a NumPy array, wherever they are."""
    try:
        import numpy as np
    except ModuleNotFoundError as error:
        raise EndlexError("arrays need NumPy: pip install numpy, or log a file") from error
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def _encode_array(array: Any) -> bytes:
    """Return an array as PNG, whose format is at https://www.w3.org/TR/png-3/."""
    import struct
    import zlib

    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    array = array[:, :, None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        raise EndlexError(f"an image is [H, W] or [H, W, 1, 3 or 4], not {list(array.shape)}")
    if array.dtype != "uint8":
        array = (array.astype("float64").clip(0, 1) * 255 + 0.5).astype("uint8")
    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    color = {1: 0, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def count_values(values: Any, bins: int, edges: Sequence[float] | None) -> dict[str, Any]:
    """Return a histogram as a table; non-finite values are left out, none is an `EndlexError`."""
    array = as_array(values).ravel()
    if edges is None:
        import numpy as np

        finite = array[np.isfinite(array)]
        if not len(finite):
            raise EndlexError(f"none of the {len(array):,} values is finite")
        counts, limits = np.histogram(finite, bins)
    else:
        counts, limits = array, as_array(edges)
        if len(limits) != len(counts) + 1:
            raise EndlexError(f"{len(counts)} counts need {len(counts) + 1} edges")
    rows = zip(limits[:-1].tolist(), limits[1:].tolist(), counts.tolist(), strict=True)
    return {"columns": HISTOGRAM, "rows": list(map(list, rows))}
