"""What people see: consoles, tables, progress, durations and sizes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Self

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

KEPT_LINES = 20
"""Number of a training run's lines that stay on a terminal, above the bar."""
PLAIN_LINE_SECONDS = 10.0
"""Time between plain lines; the first and the last step always get one."""
LIVE_SECONDS = 0.2
"""Time between changes of a live line."""


def build_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Build a console that prints text unchanged, without wrapping or markup."""
    return Console(
        soft_wrap=True, markup=False, emoji=False, highlight=False, stderr=stderr, quiet=quiet
    )


def build_table(*columns: str, title: str | None = None, num_texts: int = 1) -> Table:
    """Build a table for 80 columns; those after the first `num_texts` hold figures."""
    table = Table(
        title=title, title_justify="left", box=SIMPLE, collapse_padding=True, pad_edge=False
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < num_texts else "right", overflow="fold")
    return table


class LiveLine:
    """Show the progress of something long: a bar on a terminal, plain lines elsewhere.

    A context manager.

    Args:
        total: amount of work, in any unit; None if it is unknown.
        transient: whether the bar disappears at the end.
    """

    def __init__(
        self,
        console: Console,
        text: str,
        total: float | None = None,
        done: int = 0,
        transient: bool = True,
    ) -> None:
        self.console, self._live = console, console.is_terminal
        self._began = self._shown = time.monotonic()
        columns = BarColumn(bar_width=20), TextColumn("{task.description}", markup=False)
        self._bar = Progress(
            *columns,
            console=console,
            disable=not self._live,
            transient=transient,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(text, total=total, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(
        self,
        text: str,
        done: float | None = None,
        total: float | None = None,
        *,
        always: bool = False,
    ) -> None:
        """Replace the text, unless that was done a moment ago and `always` is off."""
        now = time.monotonic()
        if not always and now - self._shown < (LIVE_SECONDS if self._live else PLAIN_LINE_SECONDS):
            return
        self._shown = now
        self._bar.update(self._task, completed=done, total=total, description=text)
        if not self._live:
            self.note(text)

    def rate(self, done: float) -> float:
        """Return how much of `done` there was per second since the start."""
        return done / max(time.monotonic() - self._began, 1e-9)

    def left(self, done: float, total: float) -> str:
        """Return the time that the rest will take at the same rate, for people."""
        return duration_text((total - done) / self.rate(done)) if done else "?"

    def note(self, text: str) -> None:
        """Print a line above the live one."""
        self._bar.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


class ProgressLine(LiveLine):
    """Show the steps of training."""

    def __init__(self, console: Console, num_iterations: int, done: int = 0) -> None:
        super().__init__(console, "compiling", num_iterations, done, transient=False)
        self._first, self._kept, self._epochs = True, -1, math.inf if done else 0.0

    def step(
        self,
        step: int,
        num_iterations: int,
        metrics: Mapping[str, float],
        seconds_left: float | None,
    ) -> None:
        """Show the figures of one finished step.

        Args:
            step: updates done, this one included.
            num_iterations: may be an estimate that changes.
            metrics: what is logged of the step.
            seconds_left: None while there is nothing to estimate it from.
        """
        passes, epochs = "", metrics.get("data/epochs")
        if epochs is not None:
            if self._epochs <= 1 < epochs:
                self.note(f"step {step}: warning: the second pass over the text begins")
            self._epochs, passes = epochs, f" | epoch {epochs:.2f}"
        share = "" if self._live else f" ({100 * step / num_iterations:.1f} %)"
        loss = f"loss {metrics['train/smooth_loss']:.4f}"
        reward = metrics.get("rollout/reward")
        more = "" if reward is None else f" | reward {reward:.3f}"
        left = "?" if seconds_left is None else duration_text(seconds_left)
        text = (
            f"step {step}/{num_iterations}{share}{passes} | {loss}{more} | "
            f"lr x{metrics['train/lr_multiplier']:.3f} | "
            f"{metrics['train/tokens_per_second']:,.0f} tok/s | "
            f"mfu {100 * metrics['train/mfu']:.1f} % | {left} left"
        )
        always = self._live or self._first or step == num_iterations
        self._first = False
        part = KEPT_LINES * step // num_iterations
        if self._live and self._kept < part < KEPT_LINES:  # the last step's bar stays by itself
            self._kept = part
            self.note(text)
        self.show(text, step, num_iterations, always=always)


def duration_text(seconds: float) -> str:
    """Return a duration for people, such as "12 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def bytes_text(size: float) -> str:
    """Return a number of bytes for people, such as "1.50 GiB"."""
    if size < 2**20:
        return f"{size:.0f} B" if size < 2**10 else f"{size / 2**10:.1f} KiB"
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"
