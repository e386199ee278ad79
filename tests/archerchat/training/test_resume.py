"""A run that was changed is refused by name, or extended on purpose."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from archerchat.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from archerchat.cli import parse
from archerchat.config import compare_configs
from archerchat.data.shards import list_shards, split_shards, write_shards
from archerchat.data.text_loader import TextLoader
from archerchat.errors import CheckpointError
from archerchat.home import Home
from archerchat.optim.schedule import Schedule
from archerchat.tokenizer.bpe import Tokenizer, train_tokenizer
from archerchat.training import resume
from archerchat.training.pretrain import PretrainConfig, Pretraining
from archerchat.training.recipe import Recipe
from archerchat.training.resume import (
    CheckpointWriter,
    _changed_flags,
    describe_extension,
)
from archerchat.training.stage import CheckpointOptions

EXTENDABLE = {
    "horizon": ({"num_iterations": 6}, "--num-iterations: 4 saved, 6 now"),
    "batch": ({"total_batch_size": 1024}, "--total-batch-size: 512 saved, 1024 now"),
    "micro-batch": ({"device_batch_size": 2}, "--device-batch-size: 4 saved, 2 now"),
    "warm-up": ({"warmup_steps": 2}, "--warmup-steps: 40 saved, 2 now"),
    "warm-down": ({"warmdown_ratio": 0.2}, "--warmdown-ratio: 0.65 saved, 0.2 now"),
    "rest": ({"final_lr_frac": 0.0}, "--final-lr-frac: 0.05 saved, 0 now"),
    "rate": ({"matrix_lr": 0.04}, "--matrix-lr: 0.02 saved, 0.04 now"),
    "decay": ({"weight_decay": 0.0}, "--weight-decay: 0.28 saved, 0 now"),
}
STRUCTURAL = {
    "width": ({"aspect_ratio": 32}, "--aspect-ratio: 16 saved, 32 now"),
    "rows": ({"max_seq_len": 32}, "--max-seq-len: 64 saved, 32 now"),
    "dtype": ({"dtype": "bfloat16"}, "--dtype: 'float32' saved, 'bfloat16' now"),
    "packing": ({"packing": "best-fit"}, "--packing: 'concat' saved, 'best-fit' now"),
    "seed": ({"seed": 7}, "--seed: 42 saved, 7 now"),
    "tokenizer": ({"tokenizer": "other"}, "--tokenizer: 'tiny' saved, 'other' now"),
}


def save_other_tokenizer(home: Home) -> None:
    train_tokenizer(["as good as new, but another"], 270).save(home.tokenizer_dir("other"))


@pytest.mark.parametrize("what", [*EXTENDABLE, *STRUCTURAL])
def test_a_changed_setting_is_refused_by_name(
    trained_home: Any, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    changes, difference = (EXTENDABLE | STRUCTURAL)[what]
    save_other_tokenizer(trained_home)
    before = trained_home.listing()
    assert trained_home.pretrain(**changes) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert f"step_000004 belongs to a different run: {difference}. Resume it with its " in message
    assert "by --resume tiny" in message
    assert ("by --extend" in message) == (what in EXTENDABLE)
    assert "choose another --model-tag for a new run" in message
    assert trained_home.listing() == before


def test_a_name_is_enough_to_resume(
    tiny_home: Any, capsys: pytest.CaptureFixture[str], assert_same_run: Callable[..., None]
) -> None:
    run = {"matrix_lr": 0.03, "keep_last": 9}
    assert tiny_home.pretrain(**run, model_tag="whole") == 0
    assert tiny_home.run(*tiny_home.pretrain_words(**run), "--resume", "auto") == 0  # a new run
    assert tiny_home.run("pretrain", "--resume", "tiny", "--resume-from-step", "2") == 0
    assert_same_run(*(tiny_home.checkpoint_dir("base", tag) for tag in ("whole", "tiny")))
    assert tiny_home.run("pretrain", "--resume=tiny", "--extend", "--num-iterations", "6") == 0
    assert tiny_home.steps() == [2, 4, 6]
    assert tiny_home.run("pretrain", "--resume", "nothing") == 2
    assert "no base model 'nothing' under" in capsys.readouterr().err


def test_settings_saved_before_they_had_groups_count_too(tiny_home: Any) -> None:
    assert tiny_home.pretrain(keep_last=9) == 0
    path = tiny_home.checkpoint_dir("base", "tiny")
    for step in tiny_home.steps():
        saved = load_checkpoint(path / f"step_{step:06d}")
        config = saved.meta["config"]
        config |= config.pop("checkpoint")
        save_checkpoint(path, step, saved.state, saved.meta)
    options = resume.load_settings(PretrainConfig, tiny_home, "base", "tiny").checkpoint
    assert options == CheckpointOptions(save_every=2, keep_last=9, resume="tiny")
    assert tiny_home.pretrain(keep_last=1) == 0
    assert tiny_home.run("pretrain", "--resume=tiny", "--extend", "--num-iterations", "6") == 0
    assert tiny_home.steps() == [2, 4, 6]


def test_overwrite_starts_over(tiny_home: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny_home.pretrain(keep_last=9) == 0
    for other in ({"extend": True}, {"resume_from_step": 2}, {"resume": "tiny"}):
        assert tiny_home.pretrain(overwrite=True, **other) == 2
        assert (
            "--overwrite starts over, and --resume, --resume-from-step and"
            in capsys.readouterr().err
        )
    assert tiny_home.steps() == [2, 4]
    assert tiny_home.pretrain(overwrite=True, seed=7, num_iterations=3, save_every=None) == 0
    assert tiny_home.steps() == [3]
    assert "resuming" not in capsys.readouterr().out


def test_what_no_flag_explains_is_named_as_it_is_kept() -> None:
    before: dict[str, Any] = {"identity": {"mixture": {"sha256": "a" * 64}}, "config": {"n": 1}}
    now = {"identity": {"mixture": {"sha256": "b" * 64}}, "config": {"n": 1}}
    assert _changed_flags(before, now, False) == []
    assert compare_configs(before["identity"], now["identity"]) == [
        f"mixture.sha256: '{'a' * 40}...' saved, '{'b' * 40}...' now"
    ]
    rates = {"rate": 0.0001234567890123}, {"rate": 0.0001234567890124}
    assert compare_configs(*rates) == ["rate: 0.0001234567890123 saved, 0.0001234567890124 now"]


@pytest.mark.parametrize("what", STRUCTURAL)
def test_extend_does_not_let_another_model_or_other_data_pass(
    trained_home: Any, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    changes, difference = STRUCTURAL[what]
    save_other_tokenizer(trained_home)
    assert trained_home.pretrain(**changes, num_iterations=6, extend=True) == 2
    message = capsys.readouterr().err
    assert difference in message
    assert "num-iterations" not in message  # that one is allowed
    assert "by --extend" not in message


@pytest.mark.parametrize("what", EXTENDABLE)
def test_extend_goes_on_and_says_what_the_rate_will_do(
    trained_home: Any, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    changes = {"num_iterations": 6} | EXTENDABLE[what][0]
    assert trained_home.pretrain(**changes, extend=True) == 0
    output = capsys.readouterr().out
    assert re.search(
        r"extending at step 4 of 4 to 6 steps: the learning rate goes from x0\.\d+ to x", output
    )
    assert trained_home.steps() == [4, 6]
    assert trained_home.pretrain(**changes) == 0  # the new settings are now the run's
    assert "already trained: step 6 is in" in capsys.readouterr().out


def test_extend_continues_an_imported_run(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a checkpoint has weights and moments only."""
    directory = trained_home.checkpoint_dir("base", "tiny")
    saved = load_checkpoint(directory / "step_000004", sections=("model", "optimizer"))
    meta = {name: saved.meta[name] for name in ("model_config", "tokenizer", "stage")}
    meta["tokenizer"] = meta["tokenizer"] | {"name": "imported"}  # its content decides

    def save(*sections: str) -> None:
        save_checkpoint(directory, 4, {name: saved.state[name] for name in sections}, meta)

    save("model")
    assert trained_home.pretrain(num_iterations=6, extend=True) == 2
    assert "imported without optimizer state" in capsys.readouterr().err
    save("model", "optimizer")
    assert trained_home.pretrain(num_iterations=3, extend=True) == 2
    assert "step_000004 is past the horizon of 3 steps" in capsys.readouterr().err
    assert trained_home.pretrain(num_iterations=6, aspect_ratio=32, extend=True) == 2
    assert "model_config.model_dim: 32 saved, 64 now" in capsys.readouterr().err
    assert trained_home.pretrain(num_iterations=6, extend=True) == 0
    loop = load_checkpoint(directory / "step_000006", sections=("loop",)).state["loop"]
    assert (loop["step"], loop["tokens"]) == (6, 6 * 512)
    last = load_checkpoint(directory / "step_000006", sections=("optimizer",)).state["optimizer"]
    assert last["steps_taken"] == 6
    assert re.search(r"step 6/6 .*loss [56]\.", capsys.readouterr().out)


def test_extend_warns_of_a_jump_back_to_a_high_rate(
    tiny_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"warmup_steps": 1, "eval_every": None}
    assert tiny_home.pretrain(**run) == 0
    capsys.readouterr()
    assert tiny_home.pretrain(**run, num_iterations=12, extend=True) == 0
    output = capsys.readouterr().out
    assert "the learning rate goes from x0.367 to x1.000, ends at x0.169\n" in output
    assert "warning: that is 2.7 times the rate that was planned there" in output


def test_extend_needs_a_run_and_a_horizon_ahead_of_it(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained_home.pretrain(num_iterations=3, extend=True) == 2
    assert "step_000004 is past the horizon of 3 steps" in capsys.readouterr().err
    assert trained_home.pretrain(model_tag="new", extend=True) == 2
    assert "leave --extend out" in capsys.readouterr().err


def test_other_data_is_refused(tiny_home: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stop_early = {"num_iterations": 4, "save_every": 2, "keep_last": 2}
    assert tiny_home.pretrain(**stop_early) == 0
    write_shards(["other words"] * 90, tiny_home.data_dir("tiny"), documents_per_shard=30)
    before = tiny_home.listing()
    assert tiny_home.pretrain(**stop_early, resume_from_step=2) == 1
    assert (
        "the data loader cannot resume: shards: [['shard_00000.parquet'" in capsys.readouterr().err
    )
    assert tiny_home.listing() == before


def test_weights_without_training_state_cannot_be_resumed(
    tiny_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_home.checkpoint_dir("base", "tiny")
    save_checkpoint(directory, 900, {"model": {}}, {"source": "nanochat"})
    assert tiny_home.pretrain() == 1
    assert "no training state to resume (nanochat)" in capsys.readouterr().err


PEAKS = {"matrix": 0.02, "smear": 0.2, "off": 0.0}
LONG = Schedule(num_iterations=1000, weight_decay=0.1)


@pytest.mark.parametrize(
    ("before", "step", "new_peaks", "expected"),
    [
        (
            replace(LONG, num_iterations=500),
            400,
            PEAKS,
            "extending at step 400 of 500 to 1000 steps: the learning rate goes from x0.342 to "
            "x0.927, ends at x0.051\nwarning: that is 2.7 times",
        ),
        (
            LONG,
            200,
            PEAKS | {"matrix": 0.03, "off": 1.0},
            "extending at step 200 of 1000 to 1000 steps: the learning rate goes from x1.000 to "
            "x1.000, falls from step 350, ends at x0.051; the peak rates change: matrix 0.02 to "
            "0.03, off 0 to 1",
        ),
        (LONG, 10, PEAKS | {"smear": 0.4}, "smear 0.2 to 0.4\nwarning: that is 2.0 times"),
        (replace(LONG, warmdown_ratio=0.1), 700, PEAKS, "from x1.000 to x0.488, ends at x0.051"),
    ],
)
def test_the_description_of_an_extension(
    before: Schedule, step: int, new_peaks: dict[str, float], expected: str
) -> None:
    saved, now = (
        {"schedule": asdict(schedule), "identity": {"learning_rates": peaks}}
        for schedule, peaks in ((before, PEAKS), (LONG, new_peaks))
    )
    text = describe_extension(saved, now, step)
    assert expected in text
    assert ("warning" in text) == ("warning" in expected)


def test_rows_go_on_where_they_were_when_the_micro_batch_changes(tiny_home: Any) -> None:
    tokenizer = Tokenizer.load(tiny_home.tokenizer_dir("tiny"))
    shards, _ = split_shards(list_shards(tiny_home.data_dir("tiny")))

    def open_loader(rows: int) -> TextLoader:
        return TextLoader(shards, tokenizer, batch_size=rows, sequence_length=64)

    with open_loader(4) as loader, open_loader(2) as other:
        for _ in range(3):
            next(loader)
        path = save_checkpoint(tiny_home.root / "saved", 3, {"loader": loader.state_dict()}, {})
        saved = load_checkpoint(path).state["loader"]
        other.load_state_dict(saved)
        halves = [torch.from_numpy(next(other).inputs) for _ in range(2)]
        assert torch.equal(torch.cat(halves), torch.from_numpy(next(loader).inputs))


def test_random_numbers_go_on_where_they_were(tiny_home: Any) -> None:
    stage = Pretraining(parse(tiny_home.pretrain_words()).config, tiny_home)
    stage.build(None)
    saved = stage.state_dict()
    drawn = torch.rand(3)
    torch.rand(5)
    stage.load_state_dict(saved)
    assert torch.equal(torch.rand(3), drawn)


def test_the_best_figure_of_a_finished_run_survives_an_extension(
    tiny_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last evaluation comes after the last checkpoint, which has to know of it."""
    figures = iter([2.9, 2.7432, 2.9171])  # steps 3, 4; then 5 of the extended run
    monkeypatch.setattr(Recipe, "bits_per_byte", lambda recipe, batches: next(figures))
    run = {"save_every": 4, "eval_every": 3}
    assert tiny_home.pretrain(**run, num_iterations=4) == 0
    assert tiny_home.pretrain(**run, num_iterations=5, extend=True) == 0
    summary = json.loads((tiny_home.run_dir("tiny") / "summary.json").read_text())
    assert (summary["val_bpb_first"], summary["val_bpb"]) == (2.9, 2.9171)
    assert summary["val_bpb_best"] == 2.7432


def test_training_goes_on_while_a_copy_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, weight = threading.Event(), torch.ones(4)
    save = resume.save_checkpoint

    def slowly(*args: Any, **options: Any) -> Path:
        assert allowed.wait(30)
        return save(*args, **options)

    monkeypatch.setattr(resume, "save_checkpoint", slowly)
    writer = CheckpointWriter(tmp_path, {"identity": {}}, 2)
    writer.save(1, {"model": {"weight": weight}}, False)
    assert writer.is_writing
    assert list_checkpoints(tmp_path) == []
    weight.zero_()  # the next step
    allowed.set()
    writer.save(2, {"model": {"weight": weight}}, True)  # waits for the first
    assert writer.find(2) == tmp_path / "step_000002"
    saved = [load_checkpoint(tmp_path / f"step_{step:06d}") for step in (1, 2)]
    assert [int(each.state["model"]["weight"].sum()) for each in saved] == [4, 0]
    assert [each.meta["finished"] for each in saved] == [False, True]


def test_a_save_that_fails_is_told_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    writer = CheckpointWriter(tmp_path / "file", {}, 2)
    writer.save(1, {"model": {"weight": torch.ones(4)}}, False)
    with pytest.raises(CheckpointError, match="cannot save"):
        writer.wait()
