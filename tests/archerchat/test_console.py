"""Progress is one live line on a terminal and a few plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from archerchat.console import PLAIN_LINE_SECONDS, LiveLine, ProgressLine

FIGURES = {
    "train/smooth_loss": 5.12345,
    "train/lr_multiplier": 0.25,
    "train/tokens_per_second": 12345.6,
    "train/mfu": 0.123,
}


def take_step(line: ProgressLine, step: int = 1, seconds_left: float | None = None) -> None:
    line.step(step, 40, FIGURES, seconds_left)


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
        take_step(line)
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
            take_step(line, step)
    steps = [text.split("/")[0] for text in written(console).splitlines()]
    assert steps == ["step 1", "step 11", "step 21", "step 31", "step 40"]


def test_what_takes_long_speaks_now_and_then(clock: Clock) -> None:
    console = piped()
    with LiveLine(console, "reading", total=9) as line:
        for number in range(1, 10):
            clock.now += PLAIN_LINE_SECONDS / 4
            line.show(f"{number} read", number)
        line.show("done", always=True)
    assert written(console) == "4 read\n8 read\ndone\n"


def test_a_terminal_s_bar_is_gone_in_the_end(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    with LiveLine(console, "reading [1]") as line:
        clock.now += 1
        line.show("4 [red] read")
    assert "4 [red] read" in written(console)
    assert written(console).endswith("\x1b[2K")


def test_a_terminal_gets_a_live_line_that_notes_do_not_break() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with ProgressLine(console, 40, done=20) as line:
        take_step(line, 21)
        line.note("step 21: checkpoint saved")
    text = written(console)
    assert "\x1b[" in text
    assert "21/40" in text
    assert "loss 5.1235" in text
    assert "(52.5 %)" not in text  # the bar shows it
    assert "step 21: checkpoint saved\n" in text


def test_a_terminal_keeps_a_line_every_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []
    monkeypatch.setattr(ProgressLine, "note", lambda line, text: kept.append(text))
    with ProgressLine(Console(file=io.StringIO(), force_terminal=True), 400) as line:
        for step in range(1, 401):
            line.step(step, 400, FIGURES | {"rollout/reward": 0.25}, None)
    assert [text.split("/")[0] for text in kept] == [
        f"step {step}" for step in (1, *range(20, 400, 20))
    ]
    assert "| loss 5.1235 | reward 0.250 | lr" in kept[-1]


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
        take_step(line, seconds_left=seconds)
    assert written(console).endswith(f"| {text}\n")
