"""What a trainer calls: `init`, then `log`, `log_text`, `log_table`, `save` and `finish`.

The run that `init` returned last is also the one of the module's functions (`endlex.log` and so
on), as wandb's users know it. All of them write to the journal and return; a run that is `online`
has a process of its own, the shipper, which sends what the journal holds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_args

from endlex.client.journal import Journal, as_config, as_list
from endlex.client.process import finish_at_exit, warn_once
from endlex.client.process import warn as say
from endlex.client.run import Run
from endlex.client.run_directory import (
    RunFile,
    claim_directory,
    default_directory,
    given_run_id,
    new_run_id,
    newest_directory,
    read_run_file,
    register,
    runs_folder,
    server_url,
    session_start,
)
from endlex.protocol import TRAINER, EndlexError, check_name

P = ParamSpec("P")
T = TypeVar("T")
Mode = Literal["online", "offline", "disabled"]


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
        project: name that groups runs.
        name: the run's name; by default that of the directory's run, or one made from its id.
        config: a mapping, a dataclass or a namespace, kept with the session; what JSON cannot hold
            is kept as its `str`.
        directory: the run's own, made if missing; by default one under `dir`.
        dir: where runs' directories go; by default `$ENDLEX_DIR` or `./endlex-runs`.
        id: of the run to resume when its directory is on another machine; also taken from
            `ENDLEX_RUN_ID`.
        resume: "never" refuses a directory that holds a run, "must" one that holds none; "auto"
            or True resumes the newest run of that project and name in `dir`. By default, or with
            "allow", a run is resumed if the directory holds one.
        tags: for filtering runs in the dashboard.
        group: name of a group of runs that belong together.
        job_type: what the run is for, such as "train"; kept as a tag.
        notes: free text.
        all_ranks: record on every rank (environment variable `RANK`) and not only on rank 0, each
            in a session of its own.
        mode: `online` sends to the server of `ENDLEX_URL` in the background, `offline` leaves
            that to `endlex sync`, `disabled` records nothing. By default `ENDLEX_MODE`, else
            `online` if there is a URL.
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
    mode = _mode(mode)
    check_name(project, "project")
    if name is not None:
        check_name(name, "run name")
    rank = _environment_number("RANK")
    if mode == "disabled" or (rank and not all_ranks):
        return _remember(Run(None, None, project, name or "", config, strict=strict))
    run_id = given_run_id(id)
    if all_ranks and not (directory or run_id) and _environment_number("WORLD_SIZE"):
        raise EndlexError("all_ranks needs a directory or an id, so that the ranks share one run")
    place, owner = _claim(project, name, run_id, directory, dir, resume)
    start = session_start(
        owner,
        TRAINER,
        config=as_config(config),
        tags=[*as_list(tags or ()), *([job_type] if job_type else [])],
        group=None if group is None else str(group),
        notes=None if notes is None else str(notes),
        rank=rank,
    )
    journal = Journal(place, start)
    run = Run(place, journal, project, owner["name"], config, id=owner["run"], strict=strict)
    run.record_surroundings(
        environment=rank == 0 and _is_on("ENVIRONMENT"),
        code=save_code,
        console=_is_on("CONSOLE") if console is None else console,
    )
    finish_at_exit(run)
    if mode == "online":
        run.go_online(f"{server_url()}/runs/{run.id}")
        say(f"{project}/{run.name} is at {run.url}")
    return _remember(run)


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


def _is_on(name: str) -> bool:
    return os.environ.get(f"ENDLEX_{name}", "").strip().lower() not in ("0", "false", "off", "no")


def _mode(mode: str | None) -> Mode:
    mode = mode or os.environ.get("ENDLEX_MODE") or ("online" if server_url() else "offline")
    if mode not in get_args(Mode):
        raise EndlexError(f"mode {mode!r} must be one of {', '.join(get_args(Mode))}")
    if mode == "online" and not server_url():
        raise EndlexError("mode 'online' needs a server: set ENDLEX_URL, or use mode 'offline'")
    return mode  # type: ignore[return-value]


def _environment_number(name: str) -> int:
    """Return a number that a launcher sets, such as a rank; what it leaves empty is 0."""
    text = os.environ.get(name, "").strip()
    return int(text) if text.isdecimal() else 0


def _claim(
    project: str,
    name: str | None,
    run_id: str | None,
    directory: Path | str | None,
    folder: Path | str | None,
    resume: bool | str | None,
) -> tuple[Path, RunFile]:
    """Find or make the run's directory, and return it with whose it is."""
    if resume not in (None, True, False, "allow", "must", "never", "auto"):
        raise EndlexError(f"resume {resume!r} must be allow, must, never or auto")
    folder, new_id = Path(folder or runs_folder()), run_id or new_run_id()
    if directory is None and run_id is None and resume in (True, "auto"):
        directory = newest_directory(folder, project, name)
    if directory is None:
        directory = default_directory(folder, project, name or "run", new_id)
    place = Path(directory).absolute()
    owner = read_run_file(place)
    if owner is None and resume == "must":
        raise EndlexError(
            f"{place} holds no run to resume (resume='must'): give the run's directory; a run of "
            "another machine is joined by its id alone"
        )
    if owner is not None and resume == "never":
        raise EndlexError(f"{place} holds a run already (resume='never'): give another directory")
    if owner is None:
        owner = claim_directory(place, new_id, project, name or f"run-{new_id}")
    wanted = (project, name or owner["name"])
    if (owner["project"], owner["name"]) != wanted:
        raise EndlexError(
            f"{place} is the directory of run {owner['name']!r} of project {owner['project']!r}, "
            f"not of {wanted[1]!r} of {project!r}: give another directory"
        )
    if run_id is not None and owner["run"] != run_id:
        raise EndlexError(
            f"{place} is the directory of the run with id {owner['run']!r}, not {run_id!r}: give "
            "another directory, or leave the id (ENDLEX_RUN_ID) away"
        )
    register(place)
    return place, owner


class _Current:
    """The run that the module's functions speak of: the one that `init` returned last."""

    run: Run | None = None


def _remember(run: Run) -> Run:
    _Current.run = run
    return run


def current_run() -> Run | None:
    """The run that `init` returned last, or None."""
    return _Current.run


def _of_current(method: Callable[Concatenate[Run, P], T]) -> Callable[P, T]:
    """Return a function that calls a method of the current run."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if _Current.run is None:
            raise EndlexError("there is no run yet: call endlex.init first")
        return method(_Current.run, *args, **kwargs)

    return call


log = _of_current(Run.log)
log_text = _of_current(Run.log_text)
log_table = _of_current(Run.log_table)
log_histogram = _of_current(Run.log_histogram)
log_image = _of_current(Run.log_image)
log_file = _of_current(Run.log_file)
alert = _of_current(Run.alert)
save = _of_current(Run.save)
finish = _of_current(Run.finish)
