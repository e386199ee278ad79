"""A run as the trainer sees it: records go to the journal, and the call returns."""

from __future__ import annotations

import time
import traceback as tracebacks
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from endlex.client.journal import Journal, RunConfig, as_config, as_list, plain
from endlex.client.process import forget, status_of, warn, watch_faults
from endlex.client.recorder import Recorder
from endlex.protocol import (
    CHECKPOINT,
    CONFIG,
    EXCEPTION,
    FINISH,
    MAX_REASON_CHARS,
    MAX_TEXT_CHARS,
    REPLACES,
    STATUSES,
    EndlexError,
    Status,
    check_checkpoint_name,
)

if TYPE_CHECKING:
    from endlex.client.surroundings import Console

WATCH_SECONDS = 60.0
"""How often `log` looks whether the shipper still lives."""


class Run(Recorder):
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
        config: Any = None,
        *,
        id: str = "",
        strict: bool = False,
    ) -> None:
        super().__init__(directory, journal, name, strict)
        self.project, self.id = project, id
        self.config = RunConfig(as_config(config), self._record_config)
        """As given to `init`. What is changed here is recorded: at once for its own keys, at the
        next `save` or `finish` for what is inside their values."""
        self.url: str | None = None
        """The address of the run's page; None while the run is not sent to a server."""
        self._recorded_config = plain(self.config)
        self._console: Console | None = None

    @property
    def online(self) -> bool:
        """Whether what is recorded is sent to a server while the run is going."""
        return self.url is not None

    @property
    def recorded(self) -> int:
        """How many records this session has, without those of the console."""
        chunks = self._console.chunks if self._console else 0
        return self._journal.count - chunks if self._journal else 0

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
        outside_links: bool = False,
    ) -> str:
        """Keep a file, or all files of a directory, as a checkpoint, to be sent in the background.

        The files are copied (cloned, where the file system can), so you may change or delete them
        afterwards.

        Args:
            step: by default the last logged one.
            name: by default made from the path and the step.
            aliases: such as "best"; an alias moves from the checkpoint that had it before.
                `endlex prune` keeps checkpoints with the alias "keep".
            metadata: kept with it, such as the loss.
            replaces: a word such as "last". Once this checkpoint is published, the server drops
                the run's older ones that were saved with the same word.
            link: take hard links instead of copies, for files that are never rewritten in place,
                such as those that are written under another name and renamed. They may be deleted
                or replaced. It costs a few system calls per file, and no space.
            outside_links: follow symbolic links that lead out of the directory. Those inside it
                always are.

        Returns:
            The checkpoint's name: `name`, with a number after it if the directory has one already.
            Empty if a directory holds no files: nothing is saved then, with a warning.

        Raises:
            EndlexError: the path does not exist, a name is not one, a link leads out of the
                directory, or the run is finished.
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
                outside_links=outside_links,
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

    def finish(self, status: Status = "finished", *, error: BaseException | None = None) -> None:
        """Record the run's end; a second call does nothing.

        An online run waits a few seconds at most for the server to have everything, and says
        what it does not have and how to send it.

        Args:
            error: what ended it, to be recorded with its traceback.

        Raises:
            EndlexError: `status` is not one.
        """
        if status not in STATUSES:
            raise EndlexError(f"status {status!r} must be one of {', '.join(STATUSES)}")
        if self._finished or self._journal is None:
            self._finished = True
            return
        self._record_config()
        if self._console is not None:
            self._console.close()
        self._finished = True
        try:
            self._record_end(self._journal, status, error)
            self._journal.close()
            self._journal.path.with_suffix(".fault").unlink(missing_ok=True)
        except (EndlexError, OSError) as problem:
            self._refuse("finish", problem)
        if self.refused:
            names = ", ".join(
                f"{name[:40]!r} ({count:,})" for name, count in self.refused.most_common(5)
            )
            warn(f"not recorded as it was: {names}{', ...' if len(self.refused) > 5 else ''}")
        forget(self)
        if self.online and not self._journal.inherited and self.directory is not None:
            from endlex.client.shipping import wait_until_shipped

            wait_until_shipped(self.directory, self._journal.path)

    def _record_end(self, journal: Journal, status: Status, error: BaseException | None) -> None:
        end: dict[str, Any] = {"status": status}
        if error is not None and status != "finished":
            end["reason"] = describe_error(error)[:MAX_REASON_CHARS]
            if not isinstance(error, SystemExit):
                lines = "".join(tracebacks.format_exception(error))[-MAX_TEXT_CHARS:]
                journal.append_own(EXCEPTION, lines)
        journal.append(FINISH, end)

    def go_online(self, url: str) -> None:
        """Have a shipper send what this run records; without one it is recorded all the same."""
        from endlex.client.shipping import start_shipper

        self.url = url
        self._with_shipper(start_shipper)

    def record_surroundings(self, *, environment: bool, code: bool, console: bool) -> None:
        """Record what the run is: commit, command, packages; and from now on what it prints."""
        if self._journal is None:
            return
        from endlex.client.surroundings import Console, record_environment

        watch_faults(self._journal.path.with_suffix(".fault"))
        if environment:
            record_environment(self._journal, code)
        if console:
            self._console = Console(self._journal)

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

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.finish(status_of(error), error=error)


def describe_error(error: BaseException) -> str:
    """Return what ended a program, on one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by Ctrl-C"
    if isinstance(error, SystemExit):
        word = "exit status " if isinstance(error.code, int) else "exit: "
        return f"{word}{error.code}"
    return " ".join("".join(tracebacks.format_exception_only(error)).split())
