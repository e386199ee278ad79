"""Waits between tries."""

from __future__ import annotations

from endlex.client.retrying import Backoff
from endlex.client.transport import Retry


def test_waits_double_up_to_a_bound_and_heed_the_server() -> None:
    backoff = Backoff()
    waits = [backoff.wait(Retry("busy")) for _ in range(12)]
    assert all(0.5 * min(0.2 * 2**i, 30) <= w <= min(0.2 * 2**i, 30) for i, w in enumerate(waits))
    assert backoff.wait(Retry("busy", 77.0)) == 77.0
    backoff.reset()
    assert backoff.wait(Retry("busy")) <= 0.2
