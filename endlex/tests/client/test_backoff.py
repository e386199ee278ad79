"""Waits between tries."""

from __future__ import annotations

import pytest

from endlex.client import transfers
from endlex.client.transfers import Patience
from endlex.client.transport import Backoff, Retry


class Clock:
    """A clock that only sleeping and slow work move."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(transfers, "time", made)
    return made


def test_waits_double_up_to_a_bound_and_heed_the_server() -> None:
    backoff = Backoff()
    waits = [backoff.wait(Retry("busy")) for _ in range(12)]
    assert all(0.5 * min(0.2 * 2**i, 30) <= w <= min(0.2 * 2**i, 30) for i, w in enumerate(waits))
    assert backoff.wait(Retry("busy", 77.0)) == 77.0
    backoff.reset()
    assert backoff.wait(Retry("busy")) <= 0.2


def test_patience_counts_from_the_first_fault_and_makes_three_attempts(clock: Clock) -> None:
    patience, attempts = Patience(), 0

    def hang() -> str:
        nonlocal attempts
        attempts += 1
        clock.sleep(60.0)  # an answer that never comes, after an hour of hashing
        if attempts < 3:
            raise Retry("no answer in time")
        return "sent"

    clock.sleep(3600.0)
    assert patience.keep_trying(hang) == "sent"
    assert attempts == 3


def test_patience_ends_and_progress_renews_it(clock: Clock) -> None:
    patience, times = Patience(), list[float]()

    def fail() -> None:
        times.append(clock.now)
        raise Retry("busy")

    for progress in range(2):
        times.clear()
        with pytest.raises(Retry):
            patience.keep_trying(fail)
        assert 50 < times[-1] - times[0] <= 60
        patience.report(progress, 2)
