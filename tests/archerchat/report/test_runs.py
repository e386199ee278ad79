"""Journals put together: interruptions, resumed steps, which runs belong to a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from archerchat.errors import DataError, UsageError
from archerchat.files import write_json
from archerchat.home import Home
from archerchat.report.runs import RENAMES, build_run, load_family, load_run

Write = Callable[..., None]


def test_a_run_is_what_it_logged(home: Home, session: Write) -> None:
    session(home, "d8", range(4), last_bits=0.9)
    run = load_run(home, "d8")
    assert run.metrics["train/tokens"] == {i: 512.0 * (i + 1) for i in range(4)}
    assert (run.steps, run.status, run.stage) == (4, "finished", "base")
    assert run.model is not None
    assert run.model.num_layers == 8
    assert run.last("val/bpb") == 0.9
    assert run.texts == {"sample/The capital": {4: "of France is"}}
    assert run.training_seconds == pytest.approx(8.0)
    assert run.eval_seconds == 3.0


def test_resuming_replaces_the_steps_that_were_lost(home: Home, session: Write) -> None:
    """Step 2 was the checkpoint: what came of steps 2 to 4 the first time is gone."""
    session(home, "d8", range(5), last_bits=0.8, status="failed", text="lost")
    session(home, "d8", range(2, 4), last_bits=0.7, text="kept")
    run = load_run(home, "d8")
    assert list(run.metrics["train/loss"]) == [0, 1, 2, 3]
    assert run.metrics["val/bpb"] == {4: 0.7}
    assert run.texts == {"sample/The capital": {4: "kept"}}
    assert (run.num_sessions, run.status) == (2, "finished")
    # Both sessions took time: five steps of two seconds, then two.
    assert run.training_seconds == pytest.approx(10.0 + 4.0)
    assert run.eval_seconds == 6.0


def test_time_between_sessions_does_not_count() -> None:
    records: list[dict[str, Any]] = [
        {"type": "session", "time": 10.0},
        {"type": "metrics", "time": 12.0, "step": 0, "values": {"a": 1}},
        {"type": "finish", "time": 13.0, "status": "interrupted"},
        {"type": "session", "time": 100.0},
        {"type": "finish", "time": 104.0, "status": "finished"},
    ]
    run = build_run("t", records)
    assert (run.start, run.end, run.wall_seconds) == (10.0, 104.0, 7.0)


def test_an_evaluation_at_the_resumed_step_stays(home: Home, session: Write) -> None:
    session(home, "d8", range(3), last_bits=0.8, status="interrupted")
    session(home, "d8", range(3, 5), last_bits=0.7)
    run = load_run(home, "d8")
    assert run.metrics["val/bpb"] == {3: 0.8, 5: 0.7}


def test_only_a_trainer_s_sessions_count() -> None:
    records: list[dict[str, Any]] = [
        {"type": "session", "time": 1.0, "kind": "trainer"},
        {"type": "metrics", "time": 2.0, "step": 0, "values": {"a": 1}},
        {"type": "later", "time": 5.0},
        {"type": "session", "time": 6.0, "config": {}, "kind": "system"},
        {"type": "metrics", "time": 9.0, "step": 3, "values": {"a": 5}},
    ]
    run = build_run("t", records)
    assert run.metrics == {"a": {0: 1.0}}
    assert run.end == 5.0
    assert run.last("a") == 1.0


def test_a_run_without_bits_per_byte_does_not_overfit() -> None:
    """Reinforcement measures pass@k instead."""
    records: list[dict[str, Any]] = [
        {"type": "session", "time": 1.0},
        {"type": "metrics", "time": 2.0, "step": 0, "values": {"train/smooth_loss": 1.0}},
    ]
    run = build_run("t", records)
    assert not run.overfitting


def test_non_finite_values_are_no_result(home: Home, session: Write) -> None:
    session(home, "d8", range(2), last_bits=float("nan"))
    run = load_run(home, "d8")
    assert run.last("val/bpb") is None


def test_a_family_goes_from_its_base_to_its_last_stage(
    home: Home, session: Write, config: Callable[..., dict[str, Any]]
) -> None:
    session(home, "d8", range(2))
    tuned = config(stage="sft", identity={"base": {"tag": "d8"}}, config={"output_tag": None})
    session(home, "d8-sft", range(2), config=tuned)
    session(home, "other", range(2), config=config(config={"model_tag": "other"}))
    other = config(stage="sft", identity={"base": {"tag": "d8"}}, config={"output_tag": "mine"})
    session(home, "mine-sft", range(2), config=other)
    assert [run.tag for run in load_family(home, "d8")] == ["d8", "d8-sft"]
    assert [run.tag for run in load_family(home, "mine")] == ["d8", "mine-sft"]
    assert [run.tag for run in load_family(home, "other")] == ["other"]
    last = config(stage="rl", identity={"base": {"tag": "mine"}}, config={"output_tag": "best"})
    session(home, "best-rl", range(2), config=last)
    assert [run.tag for run in load_family(home, "best")] == ["d8", "mine-sft", "best-rl"]


def test_the_run_of_that_name_goes_before_others_of_the_same_model(
    home: Home, session: Write
) -> None:
    session(home, "d8", range(2))
    session(home, "trial", range(2))  # its model is called d8, too
    assert [run.tag for run in load_family(home, "d8")] == ["d8"]
    assert [run.tag for run in load_family(home, "trial")] == ["trial"]


def test_two_models_that_swapped_their_names(
    home: Home, session: Write, config: Callable[..., dict[str, Any]]
) -> None:
    session(home, "d8", range(2))
    tuned = config(stage="sft", identity={"base": {"tag": "d8"}}, config={"output_tag": None})
    session(home, "d8-sft", range(2), config=tuned)
    names = [("d8", "free"), ("other", "d8"), ("free", "other")]
    later = time.time() + 9
    write_json(home.root / RENAMES, [{"from": a, "to": b, "time": later} for a, b in names])
    assert [(run.tag, run.model_tag) for run in load_family(home, "other")] == [
        ("d8", "other"),
        ("d8-sft", "other"),
    ]


def test_no_such_run(home: Home, session: Write) -> None:
    with pytest.raises(UsageError, match="none"):
        load_family(home, None)
    session(home, "d8", range(2))
    assert [run.tag for run in load_family(home, None)] == ["d8"]
    with pytest.raises(UsageError, match=r"'d9'.*there is d8"):
        load_family(home, "d9")


def test_a_damaged_journal_is_named(home: Home, session: Write) -> None:
    session(home, "d8", range(2))
    (journal,) = (home.run_dir("d8") / "journal").glob("*.jsonl")
    journal.write_bytes(journal.read_bytes().replace(b'{"type":"metrics"', b"{", 1))
    with pytest.raises(DataError, match=r"line \d+ is not a record"):
        load_run(home, "d8")
