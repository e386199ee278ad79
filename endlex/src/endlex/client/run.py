"""What a trainer calls: `init`, then the methods of the `Run` that it returns.

The run that `init` returned last is also the one of `endlex.log` and so on. All of them write to
the journal and return; a run that is `online` has a process of its own, the shipper, which sends
what the journal holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

from endlex import protocol
from endlex.client import directories, process
from endlex.client.directories import Mode, RunFile
from endlex.client.journal import Journal, RunConfig, as_config, as_list, plain
from endlex.client.log import Log
from endlex.client.process import UNFINISHED, status_of, warn, warn_once
from endlex.protocol import EndlexError, Status, check_name

P = ParamSpec("P")
T = TypeVar("T")


class Run(Log):
    """One session of a run; `init` makes it. One that is disabled takes every call, does nothing.

    As a context manager it finishes the run: as failed when an exception leaves the block, as
    interrupted on Ctrl-C.
    """

    current: ClassVar[Run | None] = None
    """The run that `init` returned last."""

    def __init__(self, owner: RunFile, journal: Journal | None, config: Any, strict: bool) -> None:
        super().__init__(journal, owner["name"], strict)
        self.project, self.id = owner["project"], owner["run"]
        self.config = RunConfig(as_config(config), self._record_config)
        """As given to `init`. What is changed here is recorded: at once for its own keys, at the
        next `save` or `finish` for what is inside their values."""
        self.url: str | None = None  # of the run's page; None while nothing is sent to a server
        self._console: Any = None  # of `environment`, which takes long to import

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
        afterwards. Returns the checkpoint's name; empty, with a warning, if there are no files.

        Args:
            step: by default the last logged one.
            name: by default made from the path and the step; gets a number if it is taken.
            aliases: such as "best"; an alias moves from the checkpoint that had it before.
                `endlex prune` keeps checkpoints with the alias "keep".
            metadata: kept with the checkpoint, such as its loss.
            replaces: a word such as "last". Once this checkpoint is published, the server drops
                the run's older ones that were saved with the same word.
            link: take hard links, which take no space, instead of copies: for files that are
                never rewritten in place, though they may be deleted, or replaced by a rename.
            outside_links: follow symbolic links that lead out of the directory, too.

        Raises:
            EndlexError: the path does not exist, a name is not one, a link leads out of the
                directory, or the run is finished.
            OSError: the files cannot be linked or copied.
        """
        if self._journal is None or self._journal.inherited:
            return name or ""
        if self._finished:
            raise self._is_finished()
        from endlex.client.checkpoints import Staged, stage

        if replaces is not None:
            protocol.check_checkpoint_name(replaces)
            metadata = {**(metadata or {}), protocol.REPLACES: replaces}
        self._record_config()
        asked: Staged = {
            "name": name or "",
            "step": self._number(step, after=0),
            "created": time.time(),
            "aliases": as_list(aliases),
            "metadata": plain(metadata or {}),
            "files": [],
        }
        at = self._journal.directory
        note = stage(at, Path(path), asked, link=link, outside_links=outside_links)
        if note is None:
            fault = EndlexError(f"{str(path)!r} holds no files: nothing to save")
            self._refuse(str(path), fault)
            return ""
        files = [{"path": file["path"], "bytes": file["bytes"]} for file in note["files"]]
        record = {**note, "files": files}
        kept = ("step", "name", "files", "aliases", "metadata")
        self._journal.append(protocol.CHECKPOINT, {key: record[key] for key in kept})
        return note["name"]

    def has_saved(self, name: str) -> bool:
        """Whether this machine has saved a checkpoint `name` of the run, sent or not."""
        from endlex.client.checkpoints import has_saved

        return self.directory is not None and has_saved(self.directory, name)

    def finish(self, status: Status = "finished", *, error: BaseException | None = None) -> None:
        """Record the run's end, with the error's traceback; a second call does nothing.

        An online run waits a few seconds at most for the server to have everything, and says
        what it does not have and how to send it.

        Raises:
            EndlexError: `status` is not one.
        """
        if status not in protocol.STATUSES:
            raise EndlexError(f"status {status!r} must be one of {', '.join(protocol.STATUSES)}")
        if self._finished or self._journal is None or self._journal.inherited:
            self._finished = True
            return
        from endlex.client.environment import record_end

        self._record_config()
        if self._console is not None:
            self._console.close()
        self._finished = True
        try:
            record_end(self._journal, status, error)
        except (EndlexError, OSError) as problem:
            self._refuse("finish", problem)
        if self.refused:
            names = ", ".join(f"{name[:40]!r} ({n:,})" for name, n in self.refused.most_common(5))
            warn(f"not recorded as it was: {names}{', ...' if len(self.refused) > 5 else ''}")
        UNFINISHED.pop(self, None)
        if self.online:
            from endlex.client.shipper.control import wait_until_shipped

            wait_until_shipped(self._journal.directory, self._journal.path)

    def _begin(self, is_first: bool, code: bool, console: bool) -> None:
        """Record what the run is: commit, command, packages; and from now on what it prints."""
        from endlex.client.environment import Console, record_environment

        assert self._journal is not None
        process.watch_faults(self._journal.path.with_suffix(".fault"))
        if is_first and directories.is_on("ENVIRONMENT"):
            record_environment(self._journal, code)
        if console:
            self._console = Console(self._journal)
        process.watch_exit()
        UNFINISHED[self] = None

    def go_online(self, url: str) -> None:
        """Have a shipper send what this run records; without one it is recorded all the same."""
        self.url = f"{url}/runs/{self.id}"
        self._watch_shipper(begin=True)
        warn(f"{self.project}/{self.name} is at {self.url}")

    def _record_config(self) -> None:
        if self._journal is None or self._finished:
            return
        try:
            if changed := self.config.take_changes():
                self._journal.append(protocol.CONFIG, {"config": changed})
        except (EndlexError, OSError) as error:
            self._refuse("config", error)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.finish(status_of(error), error=error)


def init(
    project: str,
    name: str | None = None,
    config: Any = None,
    *,
    directory: Path | str | None = None,
    dir: Path | str | None = None,
    id: str | None = None,
    resume: bool | str | None = None,
    tags: str | Sequence[str] = (),
    group: str | None = None,
    job_type: str | None = None,
    notes: str | None = None,
    all_ranks: bool = False,
    mode: Mode | None = None,
    strict: bool = False,
    save_code: bool = True,
    console: bool | None = None,
    **of_wandb: Any,
) -> Run:
    """Start a run, or resume one: the same directory is the same run, with a new session.

    Args:
        project: name under which runs are listed together.
        name: by default that of the directory's run, or one made from its id.
        config: a mapping, a dataclass or a namespace; what JSON cannot hold is kept as its `str`.
        directory: the run's own directory, made if missing; by default one under `dir`.
        dir: where runs' directories go; by default `$ENDLEX_DIR` or `./endlex-runs`.
        id: that of a run whose directory is on another machine; by default `$ENDLEX_RUN_ID`.
        resume: "never" refuses a directory that holds a run, "must" one that holds none; "auto"
            or True resumes the newest run of that project and name in `dir`. By default, or with
            "allow", a run is resumed if the directory holds one.
        tags: words by which the dashboard filters runs.
        group: name of the group to which the run belongs, such as a sweep's.
        job_type: what the run is for, such as "train"; kept as a tag.
        notes: free text, shown on the run's page.
        all_ranks: record on every rank (variable `RANK`) in its own session, not on rank 0 alone.
        mode: `online` sends to the server of `ENDLEX_URL`, `offline` leaves that to `endlex sync`,
            `disabled` records nothing. By default `ENDLEX_MODE`, else `online` if there is a URL.
        strict: raise an `EndlexError` for what cannot be recorded as it is, instead of a warning.
        save_code: keep the uncommitted changes of the program's git checkout with the run.
        console: keep what the program prints; by default unless `ENDLEX_CONSOLE` is 0.
        of_wandb: other arguments of `wandb.init` are ignored, with one warning.

    Raises:
        EndlexError: a name or id is not one, the directory is another run's or not as `resume`
            wants it, or several ranks were not told which run they share.
        OSError: the directory cannot be written.
        TypeError: an argument is unknown here and to wandb.
    """
    _ignore(of_wandb)
    mode, rank = directories.chosen_mode(mode), directories.environment_number("RANK")
    check_name(project, "project")
    if name is not None:
        check_name(name, "run name")
    if mode == "disabled" or (rank and not all_ranks):
        nobody: RunFile = {"run": "", "project": project, "name": name or "", "created": 0.0}
        Run.current = Run(nobody, None, config, strict)
        return Run.current
    run_id = directories.given_run_id(id)
    if all_ranks and not (directory or run_id) and directories.environment_number("WORLD_SIZE"):
        raise EndlexError("all_ranks needs a directory or an id, so that the ranks share one run")
    place, owner = directories.find_or_claim(project, name, run_id, directory, dir, resume)
    words = as_list(tags or ()) + ([job_type] if job_type else [])
    start = directories.session_start(
        owner,
        protocol.TRAINER,
        config=as_config(config),
        tags=[check_name(tag, "tag") for tag in words],
        group=None if group is None else str(group),
        notes=None if notes is None else str(notes),
        rank=rank,
    )
    run = Run(owner, Journal(place, start), config, strict)
    run._begin(rank == 0, save_code, directories.is_on("CONSOLE") if console is None else console)
    if mode == "online" and (url := directories.server_url()):
        run.go_online(url)
    Run.current = run
    return run


OF_WANDB = {
    *("allow_val_change", "anonymous", "config_exclude_keys", "config_include_keys", "entity"),
    *("force", "fork_from", "magic", "monitor_gym", "reinit", "resume_from", "settings"),
    *("sync_tensorboard", "tensorboard"),
}
"""Arguments of `wandb.init` that mean nothing here."""


def _ignore(arguments: dict[str, Any]) -> None:
    unknown = [name for name in arguments if name not in OF_WANDB]
    if unknown:
        raise TypeError(f"init() has no argument {unknown[0]!r}")
    if given := sorted(name for name, value in arguments.items() if value is not None):
        warn_once(f"init ignores what means nothing here: {', '.join(given)}")


def of_current(method: Callable[Concatenate[Run, P], T]) -> Callable[P, T]:
    """Return a function that calls a method of the current run."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if Run.current is None:
            raise EndlexError("there is no run yet: call endlex.init first")
        return method(Run.current, *args, **kwargs)

    return call
