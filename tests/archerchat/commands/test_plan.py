"""What `archerchat plan` prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from archerchat.cli import parse
from archerchat.commands.plan import plan
from archerchat.data.shards import write_shards
from archerchat.dial import DialConfig
from archerchat.home import Home
from archerchat.planning.plan import PlanConfig
from archerchat.tokenizer.bpe import Tokenizer


def test_tables_name_every_figure_and_every_assumption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plan(PlanConfig(DialConfig(12), gpu="RTX 4090"), Home(tmp_path))
    out = capsys.readouterr().out
    for text in (
        "286.3M",
        "110.1M",
        "524,288",
        "2,520",
        "759.7M",
        "32 + 1",
        "device batch size",
        "165.2 TFLOP/s",
        "assumed for this kind of device; --mfu sets it",
        "at 450 W per card; the rest of the machine is not counted",
        "KV cache",
    ):
        assert text in out, text


def test_json_is_one_object_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(PlanConfig(DialConfig(12), gpu="H100", num_gpus=8, json=True), Home(tmp_path))
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    content = json.loads(out)
    assert content["hyperparameters"]["total_tokens"] == 1321205760
    assert content["hyperparameters"]["parameters"]["total"] == 286261730
    assert content["hyperparameters"]["learning_rates"]["matrix"] == 0.02
    assert content["memory"]["estimate"]["fixed"] < content["memory"]["peak_bytes"]
    assert content["machine"]["gpu"]["name"] == "H100"
    assert content["time"]["cost"] > 0
    assert len(content["schedule_points"]) == 5


def test_what_does_not_fit_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plan(PlanConfig(DialConfig(26), gpu="RTX 3070"), Home(tmp_path))
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "smaller --depth or --max-seq-len" in out


def test_it_ends_with_the_commands_to_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "plan --depth 4 --gpu 4090 --window-pattern L --vocab-size 8192"
    plan(parse(words.split()).config, Home(tmp_path))
    lines = capsys.readouterr().out.partition("Commands\n")[2].splitlines()
    assert lines == [
        "archerchat data download --num-shards 2",
        "archerchat tokenizer train --vocab-size 8192",
        "archerchat pretrain --depth 4 --window-pattern L --device-batch-size 64",
        "archerchat eval base --model-tag d4",
        "archerchat sft --model-tag d4",
        "archerchat eval chat --model-tag d4",
    ]
    for line in lines:
        parse(line.split()[1:])


def test_data_that_is_here_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    home = Home(tmp_path)
    write_shards(["x" * 999] * 2000, home.data_dir("mine"), documents_per_shard=1000)
    Tokenizer({bytes([value]): value for value in range(256)}).save(home.tokenizer_dir("bytes"))
    run = DialConfig(2, max_seq_len=128, num_iterations=8, total_batch_size=250_112)
    config = PlanConfig(run, data="mine", tokenizer="bytes", gpu="H100")
    plan(config, home)
    out = capsys.readouterr().out
    assert "about 1,000,000 tokens; 2.00 passes, 100.0% of the text in rows. Warning" in out
    assert "concat" in out
    assert "best-fit keeps 12.9% of the text" in out
    plan(replace(config, json=True), home)
    content = json.loads(capsys.readouterr().out)
    assert content["text"]["packing"] == "concat"
    assert content["text"]["passes"] == pytest.approx(2, rel=0.001)
    assert content["hyperparameters"]["model"]["vocab_size"] == 265
