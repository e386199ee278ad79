"""The benchmark of the server is fair: new prompts, turns, and no credit for what failed."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

OPTIONS = argparse.Namespace(clients=8, tokens=4, rounds=4, requests=30)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("serve")


def test_every_prompt_is_new_and_engine_and_server_take_turns(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, ...]] = []
    turns: list[str] = []
    given: list[tuple[int, ...]] = []

    async def ask(port: int, body: dict[str, Any], leave_after: int | None = None) -> Any:
        sent.append(tuple(body["prompt"]))
        turns.append("server")
        return serve.Answer(body["max_tokens"], 0.001, False)

    def engine(prompts: Sequence[Sequence[int]]) -> float:
        given.extend(map(tuple, prompts))
        turns.append("engine")
        return 100.0

    monkeypatch.setattr(serve, "ask", ask)
    client = serve.Client(0, {})
    found = serve.measure_speed(OPTIONS, client, engine)
    serve.measure_load(OPTIONS, client)
    assert client.leave_at_random(OPTIONS.requests, 3) == 0
    assert len(sent) == len(set(sent)) > 200
    assert len(given) == len(set(given)) == 8 * 5  # one round to warm up
    assert set(given) <= set(sent)
    # The 8 at once, one alone and a burst of 2; the engine comes after the 8, or before them.
    late, early = ["server"] * 8 + ["engine"] + ["server"] * 3, ["engine"] + ["server"] * 11
    assert turns[: 5 * 12] == late + early + late + early + late
    assert found["rounds"] == 4


@pytest.mark.parametrize(("tokens", "failed"), [(4, True), (3, False), (0, True)])
def test_an_answer_that_failed_or_is_short_ends_the_benchmark(
    serve: Any, monkeypatch: pytest.MonkeyPatch, tokens: int, failed: bool
) -> None:
    async def ask(port: int, body: dict[str, Any], leave_after: int | None = None) -> Any:
        return serve.Answer(tokens, 0.001, failed)

    monkeypatch.setattr(serve, "ask", ask)
    client = serve.Client(0, {})
    with pytest.raises(AssertionError):
        client.at_once(client.prompts(2), 4)
    with pytest.raises(AssertionError):
        client.keep_asking(2, 4, 4)
