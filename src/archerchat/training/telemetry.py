"""Record a run's metrics, samples and checkpoints with Endlex.

Rank 0 writes one journal per session into the run's directory (`Home.run_dir`); on other ranks
every call does nothing. Without a server (`ENDLEX_URL`) nothing else runs and nothing is sent. With
one, a separate process sends the journal and the checkpoints. Metrics are grouped by prefix:

    train/loss  train/last_micro_batch_loss  train/smooth_loss  train/lr_multiplier
    train/matrix_lr  train/muon_momentum  train/muon_weight_decay  train/tokens_per_second
    train/mfu  train/memory_bytes  train/grad_scale (float16)
    train/tokens  train/flops  train/seconds: what charts can use as their x axis
    data/epochs (passes over the text)  data/text_share (of it in rows, repeats counted once)
    val/bpb  eval/seconds, and what else a stage evaluates
    core/score  core/low  core/high (its 95 % interval)  core/task/<label> (centred)  core/seconds
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, SupportsFloat

import torch

import endlex
from archerchat import __version__
from archerchat.errors import DataError, UsageError
from archerchat.home import Home

PROJECT = "archerchat"
PushCheckpoints = Literal["auto", "all", "last", "best", "none"]
Occasion = Literal["last", "best"]
"""Why a checkpoint is pushed: it was just saved, or just found to be the best."""


@dataclass(frozen=True)
class TelemetryConfig:
    """Endlex options."""

    push_checkpoints: PushCheckpoints = "auto"
    """Checkpoints to send in the background: `all`, `none`, `last`, or `best` (lowest val/bpb or
    highest pass rate); a new last or best one replaces the previous one. `auto` is `last` if
    `ENDLEX_URL` names a server, else `none`. Without a server they wait for `endlex sync`."""
    tags: tuple[str, ...] = ()
    """Tags for filtering runs in the dashboard."""


@dataclass(frozen=True)
class MetricsLog:
    """Record one run's metrics; without a `run`, as on every rank but the first, do nothing."""

    run: endlex.Run = field(default_factory=partial(endlex.init, PROJECT, mode="disabled"))
    push_checkpoints: PushCheckpoints = "none"
    name_suffix: str = ""
    """Suffix of checkpoint names on the server: another machine may have saved the same step."""

    def log(self, values: Mapping[str, SupportsFloat], step: int) -> None:
        """Record scalars of one step, non-finite ones and tensors of one element too."""
        self.run.log(values, step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Record a text of one step, such as a sample."""
        self.run.log_text(name, text, step=step)

    def push_checkpoint(
        self, path: Path, step: int, occasion: Occasion, metadata: Mapping[str, float]
    ) -> str | None:
        """Hand a saved checkpoint to Endlex if the user wants it; return what failed, or None.

        Its files are linked, so it may be deleted afterwards.
        """
        keeps_all, name = self.push_checkpoints == "all", path.name + self.name_suffix
        if occasion != ("last" if keeps_all else self.push_checkpoints):
            return None
        replaces = None if keeps_all else occasion
        return self._save(
            path, name, step=step, aliases=(occasion,), metadata=metadata, replaces=replaces
        )

    def push_tokenizer(self, directory: Path) -> str | None:
        """Hand the tokenizer to Endlex once per run, if checkpoints are pushed; return as above."""
        if self.push_checkpoints == "none" or self.run.has_saved("tokenizer"):
            return None
        with suppress(endlex.EndlexError):  # a run.json of something else
            pulled = endlex.read_run_file(directory)
            if pulled and pulled["run"] == self.run.id:
                return None  # `endlex pull` brought it from there
        return self._save(directory, "tokenizer", step=0, aliases=("keep",))

    def _save(self, path: Path, name: str, **options: Any) -> str | None:
        try:
            # Linked: such files are renamed into place and never rewritten.
            self.run.save(path, name=name, link=True, **options)
        except (endlex.EndlexError, OSError) as error:
            return str(error)
        return None

    def finish(self, status: Literal["finished", "interrupted"]) -> None:
        """Record how the run ended, unless that is done already."""
        self.run.finish(status)


@contextmanager
def open_run(
    home: Home,
    tag: str,
    config: Mapping[str, Any],
    telemetry: TelemetryConfig | None = None,
    *,
    group: str | None = None,
    resumed_from: Path | None = None,
    rank: int = 0,
) -> Iterator[MetricsLog]:
    """Record a session of run `tag`, with a journal of its own, and how the block ends.

    Args:
        group: the command.
        resumed_from: the checkpoint's directory. If `endlex pull` brought it here, and the run is
            not on this machine yet, the session joins the checkpoint's run.

    Raises:
        UsageError: the directory belongs to another run, or does not say to which.
    """
    if rank:
        yield MetricsLog()
        return
    directory, telemetry = home.run_dir(tag), telemetry or TelemetryConfig()
    try:
        run = endlex.init(
            PROJECT,
            tag,
            {**config, "environment": describe_environment()},
            directory=directory,
            id=_run_to_join(directory, tag, resumed_from),
            tags=telemetry.tags,
            group=group,
            save_code=False,  # it would start a process
        )
    except endlex.EndlexError as error:
        raise UsageError(f"{error}; or choose another name for the run") from error
    push = telemetry.push_checkpoints
    if push == "auto":
        push = "last" if run.online else "none"
    with run:
        yield MetricsLog(run, push, f"-{run.session[-6:]}" if resumed_from and run.session else "")


def _run_to_join(directory: Path, tag: str, resumed_from: Path | None) -> str | None:
    """Return the id of a pulled checkpoint's run; None where the run is here already."""
    if resumed_from is None or endlex.given_run_id() or endlex.read_run_file(directory):
        return None
    owner = endlex.read_run_file(resumed_from)
    if owner is None or (owner["project"], owner["name"]) != (PROJECT, tag):
        return None
    return owner["run"]


def read_records(home: Home, tag: str) -> Iterator[dict[str, Any]]:
    """Yield what run `tag` recorded, session after session, as `endlex.read_run` reads it.

    Texts that Endlex records itself are left out.

    Raises:
        DataError: a journal is damaged or cannot be read.
    """
    try:
        for record in endlex.read_run(home.run_dir(tag)):
            if not str(record.get("name", "")).startswith("run/"):  # console, diff, packages
                yield record
    except (endlex.EndlexError, OSError) as error:
        raise DataError(f"cannot read the run {tag!r}: {error}") from error


def describe_environment() -> dict[str, str | int | None]:
    """Describe the machine for a session's config; its `hardware` describes the device."""
    found = endlex.describe_environment(Path(__file__))
    return {
        "archerchat": __version__,
        "python": found["python"],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "system": found["system"],
        "cpus": found["cpus"],
        "git_commit": found.get("commit"),
        "command": found["command"],
    }
