"""`archerchat eval base`: bits per byte of both splits, samples, and the figures as JSON."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from archerchat.checkpoint import save_checkpoint
from archerchat.commands.eval_base import EvalBaseConfig, evaluate
from archerchat.data.shards import write_shards
from archerchat.exchange.nanochat import to_archerchat_names
from archerchat.home import Home
from archerchat.model.config import ModelConfig
from archerchat.tokenizer.bpe import Tokenizer, load_ranks

QUICK = ("eval", "base", "--split-tokens", "512", "--device-batch-size", "4", "--device", "cpu")


def test_it_measures_what_training_measured(
    trained_home: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    words = (*QUICK, "--dtype", "float32", "--json", str(file))
    assert trained_home.run(*words) == 0
    output = capsys.readouterr().out
    assert "Bits per byte on tiny" in output
    results = json.loads(file.read_text())
    assert results["step"] == 4
    assert results["checkpoint"].endswith("base/tiny/step_000004")
    for split in ("train", "val"):
        bits = results["bits_per_byte"][split]
        assert re.search(rf"│ {split} +│ +{bits:.4f} │ +512 │", output)
    figures = json.loads((trained_home.run_dir("tiny") / "summary.json").read_text())
    assert results["bits_per_byte"]["val"] == pytest.approx(figures["val_bpb"], rel=1e-6)
    assert "no prompt ─" in output


def test_parts_and_steps_can_be_chosen(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained_home.run(*QUICK, "--eval", "bpb", "--step", "2") == 0
    output = capsys.readouterr().out
    assert "step_000002\n" in output
    assert "prompt" not in output


def test_other_data_can_be_measured(
    trained_home: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_shards(["a b c", "", "d e f"] * 40, tmp_path / "x", documents_per_shard=60)
    assert trained_home.run(*QUICK, "--eval", "bpb", "--data", str(tmp_path / "x")) == 0
    assert f"Bits per byte on {tmp_path / 'x'}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (("--eval", "sat"), "--eval sat: 'sat' is not one of core, bpb, sample", 2),
        (("--eval", "bpb,,"), "'' is not one of core, bpb, sample", 2),
        (("--split-tokens", "0"), "--split-tokens is 0; it must be at least 1", 2),
        (("--device-batch-size", "-4"), "--device-batch-size is -4", 2),
        (("--model-tag", "big"), "no base model 'big' under", 2),
        (("--step", "9"), "it holds 2, 4", 2),
        (("--data", "nowhere"), "no data 'nowhere' under", 2),
        (("--json", "/proc/nowhere/figures.json", "--eval", "bpb"), "check the disk", 1),
    ],
)
def test_nonsense_is_refused(
    trained_home: Any,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
    code: int,
) -> None:
    assert trained_home.run(*QUICK, *words) == code
    assert message in capsys.readouterr().err


def test_a_model_that_does_not_say_its_data_needs_it_given(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer.load(trained_home.tokenizer_dir("tiny"))
    source = trained_home.checkpoint_dir("base", "tiny") / "step_000004" / "model.safetensors"
    config = ModelConfig(64, 360, 2, 2, 2, 32)
    save_imported(trained_home, config, load_file(source), "tiny", tokenizer)
    assert trained_home.run(*QUICK, "--model-tag", "imported") == 2
    assert "does not say what it was trained on: give --data" in capsys.readouterr().err
    words = (*QUICK, "--model-tag", "imported", "--data", "tiny", "--eval", "bpb")
    assert trained_home.run(*words) == 0


def save_imported(
    home: Home, config: ModelConfig, weights: Any, name: str, tokenizer: Tokenizer
) -> None:
    meta = {
        "model_config": asdict(config),
        "tokenizer": {"name": name, "fingerprint": tokenizer.fingerprint},
    }
    save_checkpoint(home.checkpoint_dir("base", "imported"), 200, {"model": weights}, meta)


def test_the_references_figures(oracle_dir: Path, tmp_path: Path) -> None:
    ranks = load_ranks(oracle_dir / "tokenizer" / "mergeable_ranks.tiktoken")
    home, tokenizer = Home(tmp_path), Tokenizer(ranks)
    tokenizer.save(home.tokenizer_dir("golden"))
    stored = load_file(oracle_dir / "train_final.safetensors")
    weights = to_archerchat_names({name: tensor.float() for name, tensor in stored.items()})
    save_imported(home, ModelConfig(256, 4096, 4, 2, 2, 128), weights, "golden", tokenizer)
    config = EvalBaseConfig(
        eval="bpb",
        data=str(oracle_dir / "corpus"),
        split_tokens=10 * 4 * 256,
        device_batch_size=4,
        json=tmp_path / "figures.json",
        device="cpu",
        dtype="float32",
    )
    evaluate(config, home)
    figures = json.loads((tmp_path / "figures.json").read_text())["bits_per_byte"]
    golden = json.loads((oracle_dir / "bpb_goldens.json").read_text())["train_final_rounded"]
    for split in ("train", "val"):
        assert figures[split] == pytest.approx(golden[f"{split}_B4_T256_steps10"], rel=1e-5)
