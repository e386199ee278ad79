"""A run as the trainer sees it: records go to the journal, and the call returns."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from endlex.client.journal import Journal
from endlex.client.process import forget, status_of, warn
from endlex.client.values import (
    MetricKeys,
    RunConfig,
    accepted_name,
    as_config,
    as_list,
    checked_step,
    encode_members,
    plain,
)
from endlex.protocol import (
    CHECKPOINT,
    CONFIG,
    FINISH,
    MAX_STEP,
    MAX_TEXT_CHARS,
    METRICS,
    REPLACES,
    STATUSES,
    TABLE,
    TEXT,
    EndlexError,
    Status,
    check_checkpoint_name,
)
from endlex.reading import last_step

WATCH_SECONDS = 60.0
"""How often `log` looks whether the shipper still lives."""


class Run:
    """One session of a run; `init` makes it. One that is disabled takes every call, does nothing.

    Nothing that is logged stops the trainer: what cannot be recorded is left out, with one warning
    per name, and counted in `refused`. With `strict=True` it raises an `EndlexError` instead.

    As a context manager it finishes the run: as failed when an exception leaves the block, as
    interrupted when that is Ctrl-C.
    """

    def __init__(
        self,
        directory: Path | None,
        journal: Journal | None,
        project: str,
        name: str,
        config: Any = None,
        *,
        id: str = "",
        strict: bool = False,
    ) -> None:
        self.directory, self.project, self.name, self.id = directory, project, name, id
        self.config = RunConfig(as_config(config), self._record_config)
        """As given to `init`. What is changed here is recorded: at once for its own keys, at the
        next `save` or `finish` for what is inside their values."""
        self.refused: Counter[str] = Counter()
        """How often something could not be recorded as it was, by name."""
        self._strict = strict
        self._recorded_config = plain(self.config)
        self._journal = journal
        self._keys = MetricKeys(self._refuse)
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
        """Record a text of one step, such as a sample.

        Text that is too long is cut.
        """
        text = str(text)
        if len(text) > MAX_TEXT_CHARS:
            message = f"text {name!r} has {len(text):,} characters: the first {MAX_TEXT_CHARS:,}"
            self._refuse(name, EndlexError(f"{message} are kept"))
        self._record(TEXT, "text name", name, step, {"text": text[:MAX_TEXT_CHARS]})

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
        kept = []
        try:
            columns = [str(column) for column in as_list(columns)]
            for number, row in enumerate(map(list, rows)):
                if len(row) == len(columns):
                    kept.append(row)
                    continue
                has = f"has {len(row)} values for {len(columns)} columns"
                self._refuse(name, EndlexError(f"row {number} of table {name!r} {has}"))
        except TypeError as error:
            self._refuse(name, error)
            return
        self._record(TABLE, "table name", name, step, {"columns": columns, "rows": kept})

    def _record(
        self, kind: str, what: str, name: str, step: int | None, content: Mapping[str, Any]
    ) -> None:
        """Record a text or a table."""
        if self._journal is None or self._is_over():
            return
        head = {
            "step": self._number(step, after=0),
            "name": accepted_name(name, what, self._refuse),
        }
        try:
            self._journal.append(kind, head | dict(content))
        except (EndlexError, OSError) as error:
            self._refuse(name, error)

    def save(
        self,
        path: Path | str,
        *,
        step: int | None = None,
        name: str | None = None,
        aliases: str | Sequence[str] = (),
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
            Empty if a directory holds no files: nothing is saved then, with a warning.

        Raises:
            EndlexError: the path does not exist, a name is not one, or the run is finished.
            OSError: the files cannot be linked or copied.
        """
        if self._journal is None or self._journal.inherited:
            return name or ""
        if self._finished:
            raise self._is_finished()
        assert self.directory is not None
        from endlex.client.checkpoints import NothingToSave, announcement, stage

        if replaces is not None:
            metadata = {**(metadata or {}), REPLACES: check_checkpoint_name(replaces)}
        self._record_config()
        try:
            note = stage(
                self.directory,
                Path(path),
                name=name,
                step=self._number(step, after=0),
                created=time.time(),
                aliases=as_list(aliases),
                metadata=plain(metadata or {}),
                link=link,
            )
        except NothingToSave as error:
            self._refuse(str(path), error)
            return ""
        self._journal.append(CHECKPOINT, announcement(note))
        return note["name"]

    def has_saved(self, name: str) -> bool:
        """Whether this machine has saved a checkpoint `name` of the run, sent or not."""
        from endlex.client.checkpoints import has_saved

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
        self._record_config()
        self._finished = True
        try:
            self._journal.append(FINISH, {"status": status})
            self._journal.close()
        except (EndlexError, OSError) as error:
            self._refuse("finish", error)
        if self.refused:
            names = ", ".join(
                f"{name[:40]!r} ({count:,})" for name, count in self.refused.most_common(5)
            )
            warn(f"not recorded as it was: {names}{', ...' if len(self.refused) > 5 else ''}")
        forget(self)
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
            warn(f"the shipper does not start ({error})")

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

    def _record_config(self) -> None:
        """Record which keys of the configuration have changed."""
        if self._journal is None or self._finished:
            return
        now, before = plain(self.config), self._recorded_config
        changed = {k: v for k, v in now.items() if k not in before or before[k] != v}
        if changed:
            self._recorded_config = now
            try:
                self._journal.append(CONFIG, {"config": changed})
            except (EndlexError, OSError) as error:
                self._refuse("config", error)

    def _refuse(self, name: str, error: Exception) -> None:
        """Count what cannot be recorded as it is, and say so once per name, or raise if strict."""
        if self._strict:
            raise error
        self.refused[name] += 1
        if self.refused[name] == 1:
            warn(str(error))

    def _is_over(self) -> bool:
        """Whether the run is finished, which counts as a fault of who logs."""
        if self._finished:
            self._refuse("log", self._is_finished())
        return self._finished

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
        self.finish(status_of(error))
