"""Whole pretraining runs of a tiny model, by the command that users type."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.archerchat.conftest import signal_this_process

from archerchat import checkpoint
from archerchat.checkpoint import find_checkpoint, load_checkpoint
from archerchat.cli import parse
from archerchat.data.shards import write_shards
from archerchat.dial import DialConfig, build_hyperparameters
from archerchat.planning.memory import MemoryEstimate, estimate_memory
from archerchat.runtime import Runtime
from archerchat.training.pretrain import Pretraining
from archerchat.training.recipe import Recipe
from archerchat.training.run import run_stage


def summary(home: Any, run: str = "tiny") -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((home.run_dir(run) / "summary.json").read_text())
    return figures


def test_a_run_learns_and_says_what_it_does(
    tiny_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"num_iterations": 24, "eval_every": 8, "save_every": 8, "warmup_steps": 4}
    assert tiny_home.pretrain(**run, run="a-first-try") == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    for pattern in (
        r"^model +depth 2, width 32, 61,494 parameters \(36,888 scaling\)$",
        r"^training +24 steps of 512 tokens \(2 x 4 rows of 64\), [\d.e+]+ FLOPs$",
        r"^packing +concat \(best-fit keeps \d\d\.\d% of the text\)$",
        r"^data +tiny: about 18,\d{3} tokens; 0\.6\d passes, 6\d\.\d% of the text in rows$",
        r"^text: 0\.67 passes; 67\.\d% of it was in a row$",
        r"^device +.*, float32 \(forced\)$",
        r"^peak +0\.1 TFLOP/s \(measured: .*, cached\)$",
        r"^attention +matmul \(.*\)$",
        r"^time +about 0 s, if training reaches 20% of the peak$",
        r"^step 8: val/bpb \d\.\d{4} \([\d.]+ s\)$",
        r"^step 1/24 \(4\.2 %\) \| epoch 0\.0\d \| loss 5\.\d+ \| lr x0\.250 \| [\d,]+ tok/s \| ",
        r"^step 24/24 \(100\.0 %\) \| epoch 0\.67 \| loss .* \| 0 s left$",
        r"^step 8: checkpoint saved \(training waited [\d.]+ s\)\nstep 8: val/bpb ",
        r"^step 24: 'def main\(",
        r"^trained on 12,288 tokens in \d\.\d min; median step: [\d,]+ tok/s, mfu [\d.]+ %; ",
        r"^validation bits per byte: (\S+) -> (\S+) \(best \2\)$",
    ):
        assert re.search(pattern, output, re.M), pattern
    figures = summary(tiny_home, "a-first-try")
    assert "step 0: " not in output
    assert figures["val_bpb"] < figures["val_bpb_first"] - 0.1
    assert (figures["steps"], figures["tokens"]) == (24, 12288)
    assert figures["peak_flops_per_second"] == 1e11
    assert 0 < figures["mfu"] < 1
    assert tiny_home.steps() == [16, 24]
    meta = load_checkpoint(find_checkpoint(tiny_home.checkpoint_dir("base", "tiny")), ()).meta
    assert meta["config"]["dial"]["warmup_steps"] == 4
    assert meta["hardware"]["torch"] == torch.__version__
    assert meta["stage"] == "base"


def test_a_second_run_is_quick_and_changes_nothing(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = trained_home.listing()
    started = time.process_time()
    assert trained_home.pretrain() == 0
    assert time.process_time() - started < 2
    assert trained_home.listing() == before
    output = capsys.readouterr().out
    assert re.fullmatch(
        r"model 'tiny' is already trained: step 4 is in .*base/tiny; "
        r"val/bpb \d\.\d{4} -> \d\.\d{4}\n",
        output,
    )


def test_keep_last_says_how_many_checkpoints_stay(tiny_home: Any) -> None:
    quick = {"eval_every": None, "sample_every": None}
    assert tiny_home.pretrain(save_every=1, keep_last=3, **quick) == 0
    assert tiny_home.steps() == [2, 3, 4]
    assert tiny_home.pretrain(save_every=None, keep_last=1, model_tag="last", **quick) == 0
    assert tiny_home.steps("last") == [4]


def test_a_run_that_ended_in_its_last_evaluation_is_finished_by_the_next(
    tiny_home: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, calls = Recipe.bits_per_byte, []

    def interrupted(recipe: Recipe, batches: Any) -> float:
        calls.append(1)
        if len(calls) == 2:  # after step 2
            signal_this_process(signal.SIGINT)
        return measure(recipe, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Recipe, "bits_per_byte", interrupted)
        assert tiny_home.pretrain() == 130
    assert "stopped at step 4 of 4; the checkpoint is in" in capsys.readouterr().out
    assert not (tiny_home.run_dir("tiny") / "summary.json").exists()
    saved = tiny_home.listing()
    assert tiny_home.pretrain() == 0
    output = capsys.readouterr().out
    assert "step 4: val/bpb" in output
    assert "checkpoint saved" not in output
    assert "tok/s" not in output
    figures = summary(tiny_home)
    assert figures["val_bpb"] < figures["val_bpb_first"]
    assert (figures["tokens_per_second"], figures["mfu"]) == (None, None)
    now = tiny_home.listing()
    run = tiny_home.run_dir("tiny")
    assert {name for name in now if saved.get(name) != now[name]} == {
        str(max((run / "journal").glob("*.jsonl"))),
        str(run / "summary.json"),
        str(find_checkpoint(tiny_home.checkpoint_dir("base", "tiny")) / "meta.json"),
    }


def test_a_run_without_evaluations_measures_nothing_and_is_finished(
    tiny_home: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Recipe, "bits_per_byte")
    assert tiny_home.pretrain(eval_every=-1) == 0
    assert summary(tiny_home)["val_bpb"] is None
    capsys.readouterr()
    assert tiny_home.pretrain(eval_every="none") == 0
    assert "already trained" in (output := capsys.readouterr().out)
    assert output.endswith("; it was not evaluated\n")


def test_own_prompts_are_continued(tiny_home: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = tiny_home.pretrain_words(eval_every=None)
    assert tiny_home.run(*words, "--sample-prompt", "abc d", "b " * 99) == 0  # longer than a row
    output = capsys.readouterr().out
    assert re.search(r"^step 4: 'abc d", output, re.M)
    assert "def main" not in output


def test_rows_that_nobody_gave_are_the_plan_s_and_then_the_run_s(
    tiny_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs at most `CPU_TOKENS` to a micro-batch; a resumed run keeps what it had."""
    monkeypatch.setattr("archerchat.planning.memory.CPU_TOKENS", 2 * 64)
    assert tiny_home.pretrain(device_batch_size=None, num_iterations=2) == 0
    directory = tiny_home.checkpoint_dir("base", "tiny")
    meta = load_checkpoint(find_checkpoint(directory), ()).meta
    assert meta["identity"]["device_batch_size"] == 2
    monkeypatch.setattr("archerchat.planning.memory.CPU_TOKENS", 8 * 64)
    assert tiny_home.pretrain(device_batch_size=None, num_iterations=4, extend=True) == 0
    meta = load_checkpoint(find_checkpoint(directory), ()).meta
    assert meta["identity"]["device_batch_size"] == 2


def test_layers_are_computed_again_where_not_one_row_fits_also_after_a_resume(
    tiny_home: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fits(estimate: MemoryEstimate, *limits: float) -> int | None:
        return 4 if estimate.activations_per_row < kept else None

    hp = build_hyperparameters(DialConfig(2, 16, 16, max_seq_len=64, num_iterations=4), 360)
    kept = estimate_memory(hp.model, torch.float32, torch.device("cpu")).activations_per_row
    monkeypatch.setattr("archerchat.planning.memory.max_device_batch_size", fits)
    words = tiny_home.pretrain_words()
    at = words.index("--device-batch-size")
    del words[at : at + 2]
    for start in ("pretrain", "resuming from"):
        assert tiny_home.run(*words) == 0
        output = capsys.readouterr().out
        assert "one row fits only if the backward pass recomputes the layers" in output
        assert start == "pretrain" or start in output
        shutil.rmtree(tiny_home.checkpoint_dir("base", "tiny") / "step_000004")


def test_a_checkpoint_that_came_before_the_lock_is_seen(
    tiny_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process of the same command may end between the choice of rows and the lock."""
    words = tiny_home.pretrain_words()
    config = parse(words).config

    def build(*given: Any, **how: Any) -> Pretraining:
        stage = Pretraining(*given, **how)
        assert stage.saved is None
        assert tiny_home.run(*words) == 0
        return stage

    assert run_stage(build, config, tiny_home, None)
    assert "model 'tiny' is already trained" in capsys.readouterr().out


@pytest.mark.parametrize(("speed", "chosen"), [(1.25, "fp8 and float32"), (0.8, "float32")])
def test_8_bits_are_kept_only_where_they_are_faster(
    tiny_home: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    speed: float,
    chosen: str,
) -> None:
    wide = {"aspect_ratio": 64, "num_iterations": 4, "save_every": 2, "eval_every": None}
    assert tiny_home.pretrain(**wide, fp8=True) == 2
    assert "--fp8 needs an NVIDIA card of sm89 or newer, and this is cpu" in capsys.readouterr().err
    monkeypatch.setattr("archerchat.training.pretrain.supports_fp8", lambda device: True)
    times = iter([speed, 1.0])

    def median_seconds(runtime: Runtime, work: Any) -> float:
        work()
        return next(times)

    monkeypatch.setattr(Runtime, "median_seconds", median_seconds)
    assert tiny_home.pretrain(**wide, fp8=True) == 0
    pattern = rf"^precision +{chosen}; fp8 ran at {speed:.2f} times its speed$"
    assert re.search(pattern, capsys.readouterr().out, re.M)
    directory = tiny_home.checkpoint_dir("base", "tiny")

    def weights() -> dict[str, torch.Tensor]:
        saved: dict[str, torch.Tensor] = load_checkpoint(find_checkpoint(directory)).state["model"]
        return saved

    expected = weights()
    shutil.rmtree(directory / "step_000004")
    assert tiny_home.pretrain(**wide, fp8=True) == 0  # resumed as it began, without timing again
    assert re.search(rf"^precision +{chosen}$", capsys.readouterr().out, re.M)
    assert all(torch.equal(value, expected[name]) for name, value in weights().items())
    assert tiny_home.pretrain(**wide) == 2
    assert "--fp8: True saved, False now" in capsys.readouterr().err


def test_8_bits_that_do_not_fit_leave_no_gradients(
    tiny_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Pretraining(parse(tiny_home.pretrain_words(aspect_ratio=64)).config, tiny_home)
    stage.build(None)

    def median_seconds(runtime: Runtime, work: Any) -> float:
        if any(getattr(layer, "fp8", False) for layer in stage.model.modules()):
            weight = stage.model.unembedding.weight
            weight.grad = torch.ones_like(weight)  # the pass got this far
            raise torch.OutOfMemoryError
        work()
        return 1.0

    monkeypatch.setattr(Runtime, "median_seconds", median_seconds)
    stage.choose_precision(None)
    assert (stage.uses_fp8, stage.fp8_speed) == (False, 0.0)
    assert all(parameter.grad is None for parameter in stage.model.parameters())
    stage.loader.close()


def test_an_evaluation_that_fails_leaves_the_checkpoint_before_it(
    tiny_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(recipe: Recipe, batches: Any) -> Any:
        raise RuntimeError("no memory for the evaluation")

    monkeypatch.setattr(Recipe, "bits_per_byte", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        tiny_home.pretrain(eval_every=9, save_every=None)
    assert tiny_home.steps() == [4]
    monkeypatch.undo()
    assert tiny_home.pretrain(eval_every=9, save_every=None) == 0
    assert summary(tiny_home)["steps"] == 4


def test_a_diverging_run_ends_with_advice_and_an_intact_checkpoint(
    tiny_home: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = Recipe.loss, []

    def diverging(recipe: Recipe, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return loss(recipe, inputs, targets) * (math.nan if len(calls) > 6 else 1.0)

    monkeypatch.setattr(Recipe, "loss", diverging)
    assert tiny_home.pretrain(eval_every=None) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: the loss of step 3 is nan: lower the learning rates")
    assert tiny_home.steps() == [2]
    load_checkpoint(find_checkpoint(tiny_home.checkpoint_dir("base", "tiny")))
    (file,) = (tiny_home.run_dir("tiny") / "journal").glob("*.jsonl")
    journal = file.read_text().splitlines()
    assert json.loads(journal[-1])["status"] == "failed"


def test_a_full_disk_ends_the_run_and_keeps_the_older_checkpoint(
    tiny_home: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save_file

    def full(tensors: Any, file: Path) -> None:
        if "step_000004" in str(file):
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert tiny_home.pretrain(eval_every=None) == 1
    message = capsys.readouterr().err
    assert "the disk is full" in message
    assert "still intact: step 2; free some space" in message
    directory = tiny_home.checkpoint_dir("base", "tiny")
    assert [entry.name for entry in directory.iterdir()] == ["step_000002"]
    load_checkpoint(find_checkpoint(directory))
    monkeypatch.undo()
    assert tiny_home.pretrain(eval_every=None) == 0
    assert tiny_home.steps() == [2, 4]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_learn_as_much(tiny_home: Any, dtype: str) -> None:
    run = {"num_iterations": 12, "eval_every": 12, "warmup_steps": 4, "sample_every": None}
    for name in ("float32", dtype):
        assert tiny_home.pretrain(**run, dtype=name, model_tag=name) == 0
    wide, narrow = summary(tiny_home, "float32"), summary(tiny_home, dtype)
    assert narrow["val_bpb"] == pytest.approx(wide["val_bpb"], abs=0.05)
    state = load_checkpoint(find_checkpoint(tiny_home.checkpoint_dir("base", dtype))).state
    skipped = 12 - state["optimizer"]["steps_taken"]
    assert (skipped < 4) if dtype == "float16" else (skipped == 0)
    assert bool(state["scaler"]) == (dtype == "float16")


def test_the_micro_batch_changes_speed_but_not_the_result(tiny_home: Any) -> None:
    """Exact equality is out of reach: Adam turns rounding noise of zero gradients into steps."""
    for rows in (2, 8):
        assert tiny_home.pretrain(device_batch_size=rows, model_tag=f"rows{rows}") == 0
    few, many = summary(tiny_home, "rows2"), summary(tiny_home, "rows8")
    assert few["val_bpb"] == pytest.approx(many["val_bpb"], abs=1e-3)


def test_packing_is_chosen_by_what_it_keeps_and_stays_with_the_run(
    tiny_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(["a b c"] * 400, tiny_home.data_dir("short"), documents_per_shard=200)
    assert tiny_home.pretrain(data="short", num_iterations=8) == 0
    output = capsys.readouterr().out
    assert re.search(r"^packing +best-fit \(best-fit keeps 9\d\.\d% of", output, re.M)
    assert re.search(r"^data .* [1-9]\.\d\d passes, .*Warning: the text repeats", output, re.M)
    assert len(re.findall(r"^step \d: warning: the second pass over the", output, re.M)) == 1
    assert re.search(r"^step 8/8 .* \| epoch [1-9]\.\d\d \|", output, re.M)
    assert summary(tiny_home)["data/epochs"] > 1
    assert 0.9 < summary(tiny_home)["data/text_share"] < 1
    directory = tiny_home.checkpoint_dir("base", "tiny")
    meta = load_checkpoint(find_checkpoint(directory), ()).meta
    assert meta["identity"]["packing"] == meta["config"]["packing"] == "best-fit"

    # A run from before `auto`, on text for which it would choose the other.
    assert tiny_home.pretrain(packing="best-fit", model_tag="old", num_iterations=2) == 0
    assert tiny_home.pretrain(model_tag="old", num_iterations=4, extend=True) == 0
    output = capsys.readouterr().out
    assert "packing    best-fit (as this run began)\n" in output
    assert "second pass" not in output


def test_data_of_little_and_empty_text_is_enough(tiny_home: Any) -> None:
    write_shards(["", "a", "b c"] * 4, tiny_home.data_dir("little"), documents_per_shard=6)
    assert tiny_home.pretrain(data="little", num_iterations=2, packing="concat") == 0
    assert tiny_home.steps() == [2]
