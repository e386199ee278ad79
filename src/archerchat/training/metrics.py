"""The metrics of a run: names, and the only door to Endlex.

Rank 0 writes them to a journal in the run's directory (`Home.run_dir`); on the other ranks every
call does nothing. A run that is resumed goes on there, in a journal of its own. Names are grouped
by prefix:

    train/loss  train/last_micro_batch_loss  train/smooth_loss  train/lr_multiplier
    train/muon_momentum  train/tokens_per_second  train/mfu  train/seconds  train/tokens
    train/flops  train/memory_bytes  train/grad_scale (float16)
    val/bpb  eval/seconds

and a text is a sample, under the name of its prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, SupportsFloat

import endlex
from archerchat.artifacts import Home
from archerchat.errors import UsageError

PROJECT = "archerchat"
Status = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True)
class MetricsLog:
    """Record one run's metrics; `open_run` makes it. As a context manager it closes the run."""

    run: endlex.Run | None
    """None on ranks that record nothing."""

    def log(self, values: Mapping[str, SupportsFloat], step: int) -> None:
        """Record scalars of one step, non-finite ones too; tensors of one element are read."""
        if self.run is not None:
            self.run.log(values, step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Record a text of one step, such as a sample."""
        if self.run is not None:
            self.run.log_text(name, text, step=step)

    def finish(self, status: Status = "finished") -> None:
        """Record how the run ended; a second call does nothing."""
        if self.run is not None:
            self.run.finish(status)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.finish("finished" if kind is None else "interrupted" if interrupted else "failed")


def open_run(home: Home, tag: str, config: Mapping[str, Any], *, rank: int = 0) -> MetricsLog:
    """Start a journal of run `tag`, or go on with the run in another one.

    Args:
        config: the resolved one, kept with the session.
        rank: only 0 records.

    Raises:
        UsageError: the run's directory is another run's, or does not say whose it is.
    """
    if rank:
        return MetricsLog(None)
    try:
        return MetricsLog(endlex.init(PROJECT, tag, config, directory=home.run_dir(tag)))
    except endlex.EndlexError as error:
        raise UsageError(f"{error}; or choose another name for the run") from error
