"""What a stage does around the loop, whatever it trains."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from archerchat.checkpoint import list_checkpoints
from archerchat.distributed import Ranks
from archerchat.training import run


def test_a_new_run_starts_with_the_seed_s_generators(
    tiny_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []
    run_loop = run.run_loop

    def note(*arguments: Any) -> Any:
        drawn.append(torch.rand(3))
        return run_loop(*arguments)

    monkeypatch.setattr(run, "run_loop", note)
    assert tiny_home.pretrain(seed=7) == 0
    assert torch.equal(drawn[0], torch.rand(3, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize(
    ("steps", "time", "hint"),
    [(10**4, "69 s", None), (10**6, "1.9 h", "lower --num-iterations or --depth, or begin with")],
)
def test_the_time_of_a_run_is_estimated_before_its_first_step(
    tiny_home: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    steps: int,
    time: str,
    hint: str | None,
) -> None:
    """A step takes 1.4e8 operations, on a CPU that does 1e11 of them per second at its best."""
    monkeypatch.setattr(run, "run_loop", lambda *_: False)
    assert tiny_home.pretrain(num_iterations=steps, eval_every=1000) == 130
    output = capsys.readouterr().out
    assert re.search(rf"^time +about {time}, if training reaches 20% of the peak$", output, re.M), (
        output
    )
    assert "compiling" not in output
    assert ("\nhint " in output) == (hint is not None)
    assert hint is None or f"a CPU is slow for a run of this size: {hint}" in output


def test_the_estimated_time_of_a_compiled_run_names_compiling(
    tiny_home: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was estimated at 13 s took 3.5 minutes, most of them before its first step."""
    monkeypatch.setattr(run, "run_loop", lambda *_: False)
    assert tiny_home.pretrain(num_iterations=10**4, eval_every=1000, compile=True) == 130
    line = "about 69 s plus compiling (usually 1 to 3 minutes on a CPU), if training reaches"
    assert line in capsys.readouterr().out


@pytest.mark.slow
def test_a_resumed_run_says_where_from_and_what_keeps_it_from_being_exact(
    tiny_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny_home.pretrain(keep_last=9) == 0
    capsys.readouterr()
    assert tiny_home.pretrain(resume_from_step=2, compile=True) == 0
    output = capsys.readouterr().out
    path = tiny_home.checkpoint_dir("base", "tiny") / "step_000002"
    assert f"resuming from {path}\n" in output
    assert "not bit for bit after this point: compile: False saved, True now" in output


def test_a_checkpoint_of_the_format_before_resumes_too(tiny_home: Any) -> None:
    """Format 1 kept what is not tensors among the meta, under names of its own."""
    assert tiny_home.pretrain(keep_last=9) == 0
    assert tiny_home.pretrain(keep_last=9, model_tag="old") == 0
    path = tiny_home.checkpoint_dir("base", "old") / "step_000002"
    write_as_format_1(path)
    assert tiny_home.pretrain(model_tag="old", resume_from_step=2) == 0
    weights = [
        (tiny_home.checkpoint_dir("base", tag) / "step_000004" / "model.safetensors").read_bytes()
        for tag in ("tiny", "old")
    ]
    assert weights[0] == weights[1]


def write_as_format_1(path: Any) -> None:
    from archerchat.checkpoint import _digest

    content = json.loads((path / "meta.json").read_text())
    del content["sha256"]
    state = content.pop("state")
    content["format"] = 1
    content["meta"] |= {name: state[name] for name in ("loop", "loader", "scaler")}
    content["meta"]["optimizer_steps"] = state["optimizer"]["steps_taken"]
    del content["meta"]["finished"]
    (path / "meta.json").write_text(json.dumps(content | {"sha256": _digest(content)}))


def test_a_rank_that_would_train_on_other_data_is_named(
    tiny_home: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gather(ranks: Ranks, value: Any) -> list[Any]:
        starts = isinstance(value, dict) and "archerchat" in value
        return [value, {**value, "data": {"shard_00000.parquet": 1}}] if starts else [value]

    @contextmanager
    def joined(*place: Any) -> Iterator[Ranks]:
        yield Ranks(world_size=2)

    monkeypatch.setattr(Ranks, "gather", gather)
    monkeypatch.setattr("archerchat.training.stage.joined_ranks", joined)
    assert tiny_home.pretrain() == 2
    message = capsys.readouterr().err
    assert "rank 1 would train a different run than rank 0" in message
    assert "data.shard_00000.parquet: " in message
    assert not list_checkpoints(tiny_home.checkpoint_dir("base", "tiny"))


def test_all_that_ranks_sum_is_summed_before_they_part(
    trained_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines at a run's end are sums over the ranks too: a group that was left aborts."""
    events = []

    @contextmanager
    def joined(*place: Any) -> Iterator[Ranks]:
        yield Ranks()
        events.append("parted")

    gather = Ranks.gather
    monkeypatch.setattr("archerchat.training.stage.joined_ranks", joined)
    monkeypatch.setattr(
        Ranks, "gather", lambda ranks, value: (events.append("gather"), gather(ranks, value))[1]
    )
    words = ["sft", "--mixture", "Arithmetic:8", "--num-iterations", "1", "--eval-every", "none"]
    where = ["--device", "cpu", "--dtype", "float32", "--no-compile", "--sample-every", "none"]
    assert trained_home.run(*words, *where) == 0
    assert events.count("gather") > 2
    assert events[-1] == "parted"
