"""What people see: consoles, the progress of training, durations and sizes."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

PLAIN_LINE_SECONDS = 10.0
"""Time between plain lines; the first and the last step always get one."""


def build_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Build a console that prints text as it is: lines are neither wrapped nor marked up."""
    return Console(
        soft_wrap=True, markup=False, emoji=False, highlight=False, stderr=stderr, quiet=quiet
    )


@dataclass(frozen=True)
class StepReport:
    """Figures of one finished step."""

    step: int
    """Updates done, this one included."""
    num_iterations: int
    loss: float
    lr_multiplier: float
    tokens_per_second: float
    mfu: float
    seconds_left: float | None
    """None while there is nothing to estimate it from."""


class ProgressLine:
    """Show `StepReport`s; a context manager."""

    def __init__(self, console: Console, num_iterations: int, done: int = 0) -> None:
        self.console, self._live = console, console.is_terminal
        self._shown = -PLAIN_LINE_SECONDS
        self._busy_shown = time.monotonic()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            console=console,
            disable=not self._live,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("compiling", total=num_iterations, completed=done)

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def step(self, report: StepReport) -> None:
        """Show one step's figures."""
        left = "?" if report.seconds_left is None else duration_text(report.seconds_left)
        line = (
            f"loss {report.loss:.4f} | lr x{report.lr_multiplier:.3f} | "
            f"{report.tokens_per_second:,.0f} tok/s | mfu {100 * report.mfu:.1f} % | {left} left"
        )
        total = report.num_iterations  # may be an estimate that changes
        self._bar.update(self._task, completed=report.step, total=total, description=line)
        if self._live:
            return
        now = time.monotonic()
        if now - self._shown >= PLAIN_LINE_SECONDS or report.step == report.num_iterations:
            self._shown = now
            share = 100 * report.step / report.num_iterations
            self.note(f"step {report.step}/{report.num_iterations} ({share:.1f} %) | {line}")

    def busy(self, text: str) -> None:
        """Say what takes long between steps; now and then on plain output."""
        self._bar.update(self._task, description=text)
        now = time.monotonic()
        if not self._live and now - self._busy_shown >= PLAIN_LINE_SECONDS:
            self._busy_shown = now
            self.note(text)

    def note(self, text: str) -> None:
        """Print a line above the live one."""
        self._bar.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def duration_text(seconds: float) -> str:
    """Return a duration for people, such as "12 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def bytes_text(size: float) -> str:
    """Return a number of bytes for people, such as "1.50 GiB"."""
    if size < 2**20:
        return f"{size / 2**10:.1f} KiB"
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"
