"""What a trainer logs, step by step: metrics, texts, tables, pictures, alerts."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from endlex.client.journal import Journal
from endlex.client.process import warn
from endlex.client.values import MetricKeys, accepted_name, as_list, checked_step, encode_members
from endlex.protocol import (
    ALERT,
    LEVELS,
    MAX_STEP,
    MAX_TEXT_CHARS,
    MEDIA,
    METRICS,
    TABLE,
    TEXT,
    EndlexError,
    check_name,
)
from endlex.reading import last_step

SAME_ALERT_SECONDS = 60.0


class Recorder:
    """The part of a run that records; nothing that is logged stops the trainer.

    What cannot be recorded is left out, with one warning per name, and counted in `refused`. When
    strict, it raises an `EndlexError` instead.
    """

    def __init__(
        self, directory: Path | None, journal: Journal | None, name: str, strict: bool
    ) -> None:
        self.directory, self.name = directory, name
        self.refused: Counter[str] = Counter()
        """How often something could not be recorded as it was, by name."""
        self._strict = strict
        self._journal = journal
        self._keys = MetricKeys(self._refuse)
        self._last_step: int | None = None
        self._finished = False
        self._next_watch = math.inf
        self._alerts: dict[str, float] = {}

    @property
    def disabled(self) -> bool:
        """Whether nothing is recorded: by `mode`, or because another rank does."""
        return self._journal is None

    @property
    def session(self) -> str:
        """This session's id, unlike any other's; empty for a disabled run."""
        return self._journal.session if self._journal else ""

    def log(
        self, values: Mapping[str, Any], *, step: int | None = None, commit: bool | None = None
    ) -> None:
        """Record metrics of one step; a later value of the same metric and step replaces it.

        Args:
            values: by metric name, such as "train/loss"; anything that `float` takes (an array of
                one element too), NaN and infinities included, but not text. A mapping in place of
                a value is a prefix: `{"train": {"loss": 1.0}}` is "train/loss".
            step: counts from 0; one more than the last one if not given.
            commit: False leaves the step open: the next call without a step is of the same one.
        """
        journal, keys = self._journal, self._keys
        if journal is None or self._is_over():
            return
        members = []
        try:
            for name, value in values.items():
                if type(value) is float and -math.inf < value < math.inf:
                    members.append(keys[name] + repr(value))
                else:
                    members += encode_members(keys, name, value)
            with journal.lock:
                number = self._number(step)
                self._last_step = number - 1 if commit is False else number
                journal.append_members(
                    METRICS, f',"step":{number},"values":{{{",".join(members)}}}'
                )
        except (AttributeError, EndlexError, OSError) as error:
            self._refuse("log", error)  # no mapping, too much at once, or a disk that stays full
        if time.monotonic() > self._next_watch:
            self._watch_shipper()

    def log_text(self, name: str, text: str, *, step: int | None = None) -> None:
        """Record a text of one step, such as a sample; one that is too long is cut."""
        text = str(text)
        if len(text) > MAX_TEXT_CHARS:
            message = f"text {name!r} has {len(text):,} characters: the first {MAX_TEXT_CHARS:,}"
            self._refuse(name, EndlexError(f"{message} are kept"))
        self._record(TEXT, name, step, lambda: {"text": text[:MAX_TEXT_CHARS]})

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

        def content() -> dict[str, Any]:
            kept, names = [], [str(column) for column in as_list(columns)]
            for number, row in enumerate(map(list, rows)):
                if len(row) == len(names):
                    kept.append(row)
                    continue
                has = f"has {len(row)} values for {len(names)} columns"
                self._refuse(name, EndlexError(f"row {number} of table {name!r} {has}"))
            return {"columns": names, "rows": kept}

        self._record(TABLE, name, step, content)

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

        Args:
            values: numbers in any shape; or counts, where `edges` (one more) are given.
        """
        from endlex.client.media import HISTOGRAM, count_values

        def content() -> dict[str, Any]:
            return {"columns": HISTOGRAM, "rows": count_values(values, bins, edges)}

        self._record(TABLE, name, step, content)

    def log_image(
        self, name: str, image: Any, *, step: int | None = None, caption: str | None = None
    ) -> None:
        """Record a picture of one step.

        Args:
            image: a path, a PIL image, a figure of matplotlib or plotly, or an array: [H, W] or
                [H, W, 1, 3 or 4], uint8, or floats from 0 to 1.
        """
        from endlex.client.media import encode_image

        self._log_media(name, step, caption, lambda: encode_image(image))

    def log_file(
        self, name: str, path: Path | str, *, step: int | None = None, caption: str | None = None
    ) -> None:
        """Record a file of one step; its suffix says what it is: audio, video, an image."""
        from endlex.client.media import read_file

        self._log_media(name, step, caption, lambda: read_file(path))

    def _log_media(
        self,
        name: str,
        step: int | None,
        caption: str | None,
        encode: Callable[[], tuple[bytes, str]],
    ) -> None:
        from endlex.client.media import keep_media

        def content() -> dict[str, Any]:
            assert self.directory is not None
            return keep_media(self.directory, *encode(), caption)

        self._record(MEDIA, name, step, content)

    def _record(
        self, kind: str, name: str, step: int | None, content: Callable[[], dict[str, Any]]
    ) -> None:
        """Record something of a name and a step, which is not a metric."""
        if self._journal is None or self._is_over():
            return
        try:
            head = {
                "step": self._number(step, after=0),
                "name": accepted_name(name, f"{kind} name", self._refuse),
            }
            self._journal.append(kind, head | content())
        except Exception as error:  # whatever some library's figure raises
            self._refuse(name, error)

    def alert(
        self, title: str, text: str = "", level: Literal["info", "warning", "error"] = "warning"
    ) -> None:
        """Raise an alert: the server shows it, and sends it where its alerts go.

        The same title within a minute counts once.
        """
        if self._journal is None or self._is_over():
            return
        now = time.monotonic()
        if now < self._alerts.get(title, -math.inf) + SAME_ALERT_SECONDS:
            return
        self._alerts[title] = now
        try:
            if level not in LEVELS:
                raise EndlexError(f"level {level!r} must be one of {', '.join(LEVELS)}")
            content = {"title": check_name(title, "title"), "text": str(text)[:MAX_TEXT_CHARS]}
            self._journal.append(ALERT, content | {"level": level})
        except (EndlexError, OSError) as error:
            self._refuse("alert", error)

    def _number(self, step: Any, after: int = 1) -> int:
        """Return the step as a number; without a good one, that many `after` the last one."""
        if type(step) is int and 0 <= step <= MAX_STEP:
            return step
        following = min(max(self._latest_step() + after, 0), MAX_STEP)
        try:
            return following if step is None else checked_step(step)
        except EndlexError as error:
            self._refuse("step", EndlexError(f"{error}; recorded as step {following}"))
            return following

    def _latest_step(self) -> int:
        """The step logged last, here or in a session before this one, or -1."""
        if self._last_step is not None:
            return self._last_step
        return last_step(self.directory) if self.directory is not None else -1

    def _watch_shipper(self) -> None:
        """Look whether the shipper still lives."""

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
        return EndlexError(f"run {self.name!r} is finished: call endlex.init again to go on")
