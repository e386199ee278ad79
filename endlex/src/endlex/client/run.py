"""A run as the trainer sees it: records go to the journal, and the call returns."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from endlex.client import exits
from endlex.client.journal import last_step
from endlex.client.journal_writer import Journal
from endlex.client.values import MetricKeys, checked_step, encode_members, plain
from endlex.protocol import (
    CHECKPOINT,
    FINISH,
    MAX_TEXT_CHARS,
    METRICS,
    REPLACES,
    STATUSES,
    TABLE,
    TEXT,
    EndlexError,
    Status,
    check_checkpoint_name,
    check_name,
)

WATCH_SECONDS = 60.0
"""How often `log` looks whether the shipper still lives."""


class Run:
    """One session of a run; `init` makes it. One that is disabled takes every call, does nothing.

    As a context manager it finishes the run: as failed when an exception leaves the block, as
    interrupted when that is Ctrl-C.
    """

    def __init__(
        self,
        directory: Path | None,
        journal: Journal | None,
        project: str,
        name: str,
        config: Mapping[str, Any] | None = None,
        *,
        id: str = "",
    ) -> None:
        self.directory, self.project, self.name, self.id = directory, project, name, id
        self.config: dict[str, Any] = dict(config or {})
        """As given to `init`; what is changed here later is not recorded."""
        self._journal = journal
        self._keys = MetricKeys()
        self._last_step: int | None = None
        self._finished = False
        self._online = False
        self._next_watch = math.inf

    @property
    def disabled(self) -> bool:
        """Whether nothing is recorded: by `mode`, or because another rank does."""
        return self._journal is None

    @property
    def online(self) -> bool:
        """Whether a server gets what is recorded while the run goes on."""
        return self._online

    @property
    def recorded(self) -> int:
        """How many records this session has."""
        return self._journal.count if self._journal else 0

    @property
    def session(self) -> str:
        """This session's id, unlike any other's; empty for a disabled run."""
        return self._journal.session if self._journal else ""

    def log(self, values: Mapping[str, Any], *, step: int | None = None) -> None:
        """Record metrics of one step; a later value of the same metric and step replaces it.

        Args:
            values: by metric name, such as "train/loss"; anything that `float` takes (a tensor
                of one element too), NaN and infinities included, but not text. A mapping in place
                of a value is a prefix: `{"train": {"loss": 1.0}}` is "train/loss".
            step: counts from 0; one more than the last one if not given.

        Raises:
            EndlexError: a name or value is not one, or the run is finished. Nothing is recorded.
        """
        journal, keys = self._journal, self._keys
        if journal is None:
            return
        if self._finished:
            raise self._is_finished()
        members = []
        for name, value in values.items():
            if type(value) is float and -math.inf < value < math.inf:
                members.append(keys[name] + repr(value))
            else:
                members += encode_members(keys, name, value)
        step = self._latest_step() + 1 if step is None else checked_step(step)
        journal.append_members(METRICS, f',"step":{step},"values":{{{",".join(members)}}}')
        self._last_step = step
        if time.monotonic() > self._next_watch:
            self._watch_shipper()

    def log_text(self, name: str, text: str, *, step: int | None = None) -> None:
        """Record a text of one step, such as a sample.

        Raises:
            EndlexError: the name is not one, the text is too long, or the run is finished.
        """
        check_name(name, "text name")
        if len(text) > MAX_TEXT_CHARS:
            raise EndlexError(
                f"text {name!r} has {len(text):,} characters; at most {MAX_TEXT_CHARS:,} are kept"
            )
        self._append(TEXT, {"step": self._this_step(step), "name": name, "text": text})

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
            rows: one value a column; what JSON cannot hold is kept as its `str`.

        Raises:
            EndlexError: a row is longer or shorter than the columns, the table is too large, or
                the run is finished.
        """
        check_name(name, "table name")
        columns = [str(column) for column in columns]
        kept = [list(row) for row in rows]
        for number, row in enumerate(kept):
            if len(row) != len(columns):
                raise EndlexError(
                    f"row {number} of table {name!r} has {len(row)} values for {len(columns)} "
                    "columns"
                )
        content = {"name": name, "columns": columns, "rows": kept}
        self._append(TABLE, {"step": self._this_step(step), **content})

    def save(
        self,
        path: Path | str,
        *,
        step: int | None = None,
        name: str | None = None,
        aliases: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
        replaces: str | None = None,
        link: bool = False,
    ) -> str:
        """Keep a file, or all files of a directory, as a checkpoint, to be sent in the background.

        The files are copied (cloned, where the file system can), so whatever happens to them
        afterwards is no matter.

        Args:
            step: the last logged one if not given.
            name: unlike that of another checkpoint of the run; made from the path and the step if
                not given.
            aliases: such as "best"; what is saved as "keep" is not removed by `endlex prune`.
            metadata: kept with it, such as the loss.
            replaces: a word such as "last": of the run's checkpoints saved with the same word only
                the newest stays on the server, once it is published there.
            link: take hard links instead of copies, for files that are never rewritten in place,
                such as those that are written under another name and renamed. They may be deleted
                or replaced. It costs a few system calls a file, and no space.

        Returns:
            The checkpoint's name: `name`, with a number after it if the directory has one already.

        Raises:
            EndlexError: there is nothing to save, a name is not one, or the run is finished.
            OSError: the files cannot be linked or copied.
        """
        if self._journal is None or self._journal.inherited:
            return name or ""
        if self._finished:
            raise self._is_finished()
        assert self.directory is not None
        from endlex.client.staging import announcement, stage

        if replaces is not None:
            metadata = {**(metadata or {}), REPLACES: check_checkpoint_name(replaces)}
        note = stage(
            self.directory,
            Path(path),
            name=name,
            step=self._this_step(step),
            created=time.time(),
            aliases=aliases,
            metadata=plain(metadata or {}),
            link=link,
        )
        self._append(CHECKPOINT, announcement(note))
        return note["name"]

    def has_saved(self, name: str) -> bool:
        """Whether this machine has saved a checkpoint `name` of the run, sent or not."""
        from endlex.client.staging import has_saved

        return self.directory is not None and has_saved(self.directory, name)

    def finish(self, status: Status = "finished") -> None:
        """Record the run's end; a second call does nothing.

        An online run waits a few seconds at most for the server to have everything, and says
        what it does not have and how to send it.

        Raises:
            EndlexError: `status` is not one.
        """
        if status not in STATUSES:
            raise EndlexError(f"status {status!r} must be one of {', '.join(STATUSES)}")
        if self._finished or self._journal is None:
            self._finished = True
            return
        self._append(FINISH, {"status": status})
        self._finished = True
        self._journal.close()
        exits.forget(self)
        if self._online and not self._journal.inherited and self.directory is not None:
            from endlex.client.shipping import wait_until_shipped

            wait_until_shipped(self.directory, self._journal.path)

    def go_online(self) -> None:
        """Have a shipper send what this run records; without one it is recorded all the same."""
        from endlex.client.shipping import start_shipper

        self._online = True
        self._with_shipper(start_shipper)

    def _watch_shipper(self) -> None:
        """Start another shipper if this run's was killed; asking costs a few system calls."""
        from endlex.client.shipping import restart_shipper_if_killed

        self._with_shipper(restart_shipper_if_killed)

    def _with_shipper(self, act: Callable[[Path], None]) -> None:
        self._next_watch = time.monotonic() + WATCH_SECONDS
        if self.directory is None or self._journal is None or self._journal.inherited:
            return
        try:
            act(self.directory)
        except (OSError, ValueError) as error:
            print(f"endlex: the shipper does not start ({error})", file=sys.stderr)

    def _this_step(self, step: int | None) -> int:
        return max(self._latest_step(), 0) if step is None else checked_step(step)

    def _latest_step(self) -> int:
        """The step logged last, here or in a session before this one, or -1."""
        if self._last_step is not None:
            return self._last_step
        return last_step(self.directory) if self.directory is not None else -1

    def _append(self, kind: str, content: Mapping[str, Any]) -> None:
        if self._finished:
            raise self._is_finished()
        if self._journal is not None:
            self._journal.append(kind, content)

    def _is_finished(self) -> EndlexError:
        return EndlexError(f"run {self.name!r} is finished: call endlex.init again to go on")

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.finish(exits.status_of(error))
