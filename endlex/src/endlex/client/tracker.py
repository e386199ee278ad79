"""What a trainer calls: `init`, then `log`, `log_text` and `finish` on the run it returns."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, SupportsFloat

from endlex.client.journal import Journal, read_journal
from endlex.protocol import (
    FINISH,
    JOURNAL_FILE,
    MAX_TEXT_CHARS,
    METRICS,
    PROTOCOL,
    SESSION,
    TEXT,
    EndlexError,
    check_name,
)

Status = Literal["finished", "failed"]


def init(
    project: str, name: str, config: Mapping[str, Any] | None = None, *, directory: Path | str
) -> Run:
    """Start a run, or go on with it: the same directory is the same journal, as a new session.

    Args:
        project: groups runs.
        name: the run's.
        config: kept with the session; what JSON cannot hold is kept as its `str`.
        directory: the run's own, made if missing.

    Raises:
        EndlexError: a name is not one, or the directory's journal is another run's.
        OSError: the directory cannot be written.
    """
    check_name(project, "project")
    check_name(name, "run name")
    path = Path(directory) / JOURNAL_FILE
    if path.exists():
        _require_same_run(path, project, name)
    return Run(path, project, name, config or {})


def _require_same_run(path: Path, project: str, name: str) -> None:
    first = next(read_journal(path), None)
    if first is not None and (first.get("project"), first.get("name")) != (project, name):
        raise EndlexError(
            f"{path} is the journal of run {first.get('name')!r} of project "
            f"{first.get('project')!r}, not of {name!r} of {project!r}: give another directory"
        )


class Run:
    """One session of a run; `init` makes it.

    As a context manager it finishes the run, as failed when an exception leaves the block.
    """

    def __init__(self, path: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        self.project, self.name = project, name
        self._finished = False
        self._journal = Journal(path)
        host = os.uname().nodename if hasattr(os, "uname") else ""
        start = {"protocol": PROTOCOL, "project": project, "name": name, "config": dict(config)}
        self._journal.append(SESSION, {**start, "host": host, "pid": os.getpid()})

    @property
    def session(self) -> str:
        """This session's id, unlike any other's."""
        return self._journal.session

    def log(self, values: Mapping[str, SupportsFloat], *, step: int) -> None:
        """Record metrics of one step; a later value of the same metric and step replaces it.

        Args:
            values: by metric name, such as "train/loss"; anything that `float` takes (a tensor
                of one element too), NaN and infinities included, but not text.
            step: counts from 0.

        Raises:
            EndlexError: a name or value is not one, or the run is finished. Nothing is recorded.
        """
        numbers = {check_name(n, "metric name"): _number(n, v) for n, v in values.items()}
        self._append(METRICS, {"step": _step(step), "values": numbers})

    def log_text(self, name: str, text: str, *, step: int) -> None:
        """Record a text of one step, such as a sample.

        Raises:
            EndlexError: the name is not one, the text is too long, or the run is finished.
        """
        check_name(name, "text name")
        if len(text) > MAX_TEXT_CHARS:
            raise EndlexError(
                f"text {name!r} has {len(text):,} characters; at most {MAX_TEXT_CHARS:,} are kept"
            )
        self._append(TEXT, {"step": _step(step), "name": name, "text": text})

    def finish(self, status: Status = "finished") -> None:
        """Record the run's end and put the journal on the disk; a second call does nothing."""
        if self._finished:
            return
        self._append(FINISH, {"status": status})
        self._finished = True
        self._journal.close()

    def _append(self, kind: str, content: Mapping[str, Any]) -> None:
        if self._finished:
            raise EndlexError(f"run {self.name!r} is finished: call endlex.init again to go on")
        self._journal.append(kind, content)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.finish("finished" if kind is None else "failed")


def _number(name: str, value: SupportsFloat) -> float:
    if type(value) is float or type(value) is int:
        return value
    try:
        if isinstance(value, str | bytes):
            raise TypeError("text")
        return float(value)
    except (TypeError, ValueError) as error:
        raise EndlexError(f"metric {name!r} is {value!r}, which is not a number") from error


def _step(step: int) -> int:
    if not isinstance(step, int) or step < 0:
        raise EndlexError(f"step is {step!r}; it must be a whole number from 0")
    return step
