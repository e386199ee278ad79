"""Progress is one live line on a terminal and a few plain lines elsewhere."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from archerchat.console import PLAIN_LINE_SECONDS, ProgressLine, StepReport

REPORT = StepReport(
    step=1,
    num_iterations=40,
    loss=5.12345,
    lr_multiplier=0.25,
    tokens_per_second=12345.6,
    mfu=0.123,
    seconds_left=None,
)


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("archerchat.console.time", clock)
    return clock


def piped() -> Console:
    return Console(file=io.StringIO(), width=60)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_piped_progress_is_plain_lines(clock: Clock) -> None:
    console = piped()
    with ProgressLine(console, 40) as line:
        line.step(REPORT)
        line.note("step 0: [bold]val/bpb[/bold] 3.1 :smile:")
    assert written(console) == (
        "step 1/40 (2.5 %) | loss 5.1235 | lr x0.250 | 12,346 tok/s | mfu 12.3 % | ? left\n"
        "step 0: [bold]val/bpb[/bold] 3.1 :smile:\n"
    )


def test_plain_lines_come_every_few_seconds_and_at_the_end(clock: Clock) -> None:
    console = piped()
    with ProgressLine(console, 40) as line:
        for step in range(1, 41):
            clock.now += PLAIN_LINE_SECONDS / 10
            line.step(replace(REPORT, step=step))
    steps = [text.split("/")[0] for text in written(console).splitlines()]
    assert steps == ["step 1", "step 11", "step 21", "step 31", "step 40"]


def test_a_terminal_gets_a_live_line_that_notes_do_not_break() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with ProgressLine(console, 40, done=20) as line:
        line.step(replace(REPORT, step=21))
        line.note("step 21: checkpoint saved")
    text = written(console)
    assert "\x1b[" in text
    assert "21/40" in text
    assert "loss 5.1235" in text
    assert "(52.5 %)" not in text  # the bar shows it
    assert "step 21: checkpoint saved\n" in text


def test_the_live_line_is_taken_away_when_training_fails() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    hide, show = "\x1b[?25l", "\x1b[?25h"

    def fail() -> None:
        with ProgressLine(console, 40):
            assert hide in written(console)
            assert show not in written(console)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert written(console).index(show) > written(console).index(hide)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s left"),
        (99.4, "99 s left"),
        (600.0, "10 min left"),
        (5999.0, "100 min left"),
        (8 * 3600.0, "8.0 h left"),
    ],
)
def test_time_left_is_in_a_unit_people_read(clock: Clock, seconds: float, text: str) -> None:
    console = piped()
    with ProgressLine(console, 40) as line:
        line.step(replace(REPORT, seconds_left=seconds))
    assert written(console).endswith(f"| {text}\n")
