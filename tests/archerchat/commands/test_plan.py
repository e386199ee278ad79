"""What `archerchat plan` prints."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from archerchat.cli import parse
from archerchat.commands.plan import plan
from archerchat.data.shards import write_shards
from archerchat.dial import DialConfig
from archerchat.home import Home
from archerchat.planning.peak_flops import Measurement
from archerchat.planning.plan import PlanConfig
from archerchat.runtime import Runtime
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


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    runtime = Runtime(torch.device("cpu"), torch.float32, "Test CPU", "forced")
    monkeypatch.setattr("archerchat.planning.plan.build_runtime", lambda: runtime)
    measured = Measurement(2e12, (512, 512, 512), "float32")
    monkeypatch.setattr("archerchat.planning.peak_flops.measure_peak", lambda runtime: measured)


def test_a_machine_with_a_cpu_alone_gets_a_plan_of_its_own(
    cpu_only: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(PlanConfig(DialConfig(4)), Home(tmp_path))
    out = capsys.readouterr().out
    assert "Memory of this machine (estimate)" in out
    assert "more rows would not be faster here" in out
    assert "power of two" not in out
    assert "card" not in out
    plan(PlanConfig(DialConfig(26), gpu_memory=4), Home(tmp_path))
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "or a machine with more memory" in out
    plan(PlanConfig(DialConfig(4), gpu_memory=1.2), Home(tmp_path))
    assert "the largest power of two that fits" in capsys.readouterr().out


def test_the_commands_use_text_that_is_here(
    cpu_only: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Home(tmp_path)
    write_shards(["x" * 99] * 20, home.data_dir("mine"), documents_per_shard=10)
    words = "plan --depth 2 --max-seq-len 64 --num-iterations 4 --total-batch-size 512"
    plan(parse(words.split()).config, home)
    out = capsys.readouterr().out
    assert "add --data mine to see how many tokens" in out
    assert "1 micro-batch per step" in out
    assert "attention reaches 64 tokens back in 1 of them and" in " ".join(out.split())
    assert out.partition("Commands\n")[2].splitlines()[:2] == [
        "archerchat tokenizer train --data mine --vocab-size 32768",
        f"archerchat pretrain --data mine {words[5:]} --device-batch-size 8",
    ]
    Tokenizer({bytes([value]): value for value in range(256)}).save(home.tokenizer_dir("bytes"))
    plan(parse([*words.split(), "--data", "mine", "--tokenizer", "bytes"]).config, home)
    commands = capsys.readouterr().out.partition("Commands\n")[2].splitlines()
    assert commands[0].startswith("archerchat pretrain --data mine --tokenizer bytes --depth 2 ")
    for line in commands:
        parse(line.split()[1:])


def test_a_tokenizer_that_is_here_is_planned_with(
    cpu_only: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`tokenizer train --vocab-size 32768` was printed, and refused: `default` had other tokens."""
    home = Home(tmp_path)
    write_shards(["x" * 99] * 20, home.data_dir("mine"), documents_per_shard=10)
    Tokenizer({bytes([value]): value for value in range(256)}).save(home.tokenizer_dir("default"))
    run = "plan --depth 2 --max-seq-len 64 --num-iterations 4 --total-batch-size 512"

    def planned(more: str = "") -> tuple[str, list[str]]:
        plan(parse(f"{run} {more}".split()).config, home)
        out = capsys.readouterr().out
        commands = out.partition("Commands\n")[2].splitlines()
        for line in commands:
            parse(line.split()[1:])
        return out, [line for line in commands if "tokenizer" in line]

    for more in ("", "--data mine", "--vocab-size 265"):
        out, commands = planned(more)
        assert re.search(r"vocabulary +\W +265 +\W +tokenizer default; ", out)
        assert commands == []
    train, pretrain = planned("--vocab-size 512")[1]
    assert train == "archerchat tokenizer train --data mine --vocab-size 512 --name default-512"
    assert pretrain.startswith("archerchat pretrain --data mine --tokenizer default-512 --depth 2")
    train, _ = planned("--tokenizer other")[1]
    assert train == "archerchat tokenizer train --data mine --vocab-size 32768 --name other"
    assert planned("--gpu T4")[1] == ["archerchat tokenizer train --vocab-size 32768"]


def test_a_plan_for_another_machine_leaves_out_this_one_s_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Home(tmp_path)
    write_shards(["x" * 99] * 20, home.data_dir("mine"), documents_per_shard=10)
    plan(PlanConfig(DialConfig(4), gpu="T4"), home)
    out = capsys.readouterr().out
    assert "mine" not in out
    assert "archerchat data download" in out


def test_any_name_of_a_folder_is_printed_as_it_is(
    cpu_only: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Home(tmp_path)
    write_shards(["x" * 99] * 20, tmp_path / "data" / "my [red] :art:", documents_per_shard=10)
    plan(PlanConfig(DialConfig(4)), home)
    out = capsys.readouterr().out
    assert "--data my [red] :art: to" in out
    command = next(line for line in out.splitlines() if line.startswith("archerchat tokenizer"))
    assert shlex.split(command)[3:5] == ["--data", "my [red] :art:"]


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
    evaluation, training = content["time"]["evaluation_hours"], content["time"]["hours"]
    assert 0 < evaluation < training / 10  # 1 MB of validation text; the default is 42M tokens
