"""`archerchat eval base`: bits per byte, samples, CORE on the generated tasks, figures as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from archerchat.checkpoint import save_checkpoint
from archerchat.commands.eval_base import EvalBaseConfig, evaluate
from archerchat.data.shards import write_shards
from archerchat.evals.core.bundle import load_bundle
from archerchat.evals.core.evaluate import CoreEvaluation, CoreTaskResult
from archerchat.exchange.nanochat import to_archerchat_names
from archerchat.home import Home
from archerchat.model.config import ModelConfig
from archerchat.tokenizer.bpe import Tokenizer, load_ranks

QUICK = ("eval", "base", "--split-tokens", "512", "--device-batch-size", "4", "--device", "cpu")
CORE = ("eval", "base", "--eval", "core", "--bundle", "offline", "--device", "cpu")
CAPPED = (*CORE, "--dtype", "float32", "--max-per-task", "7")


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
        assert re.search(rf" {split} +{bits:.4f} +512 ", output)
    figures = json.loads((trained_home.run_dir("tiny") / "summary.json").read_text())
    assert results["bits_per_byte"]["val"] == pytest.approx(figures["val_bpb"], rel=1e-6)
    assert "no prompt ─" in output


def test_parts_and_steps_can_be_chosen(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained_home.run(*QUICK, "--eval", "bpb", "--step", "2") == 0
    output, said = capsys.readouterr()
    assert "step_000002 (the model saved last" in said
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
        (("--eval", "core", "--bundle", "nowhere"), "--bundle nowhere: there is no such folder", 2),
        (("--bundle", "offline"), "--bundle is for CORE: add --eval core", 2),
        (("--max-per-task", "0"), "--max-per-task is 0; it must be at least 1", 2),
        (("--max-length", "1"), "--max-length is 1; it must be at least 2", 2),
        (("--split", "test"), "--split test: 'test' is not one of train, val", 2),
        (("--text", "nowhere.txt"), "--text nowhere.txt: there is no such file", 2),
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
    assert not trained_home.eval_dir("base", "tiny").exists()


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


@pytest.mark.slow
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


def results_of(home: Any, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((home.eval_dir("base", "tiny") / name).read_text())
    return content


def test_figures_are_printed_and_written(
    trained_home: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert trained_home.run(*CAPPED, "--json", str(tmp_path / "all.json")) == 0
    output = capsys.readouterr().out
    files = sorted(path.name for path in trained_home.eval_dir("base", "tiny").iterdir())
    assert files == ["offline_000004_max7.json"]
    results = results_of(trained_home, "offline_000004_max7.json")
    assert results["step"] == 4
    assert results["dtype"] == "float32"
    assert results["options"] == {"max_per_task": 7, "max_length": None}
    assert {task["examples"] for task in results["tasks"]} == {7}
    assert f"{results['core']:.4f} (95 % interval" in output
    assert "42 examples in 6 tasks" in output
    assert "not CORE" in output
    for task in results["tasks"]:
        assert f"{task['label']}: accuracy {task['accuracy']:.4f}" in output
    assert json.loads((tmp_path / "all.json").read_text())["core"]["core"] == results["core"]


def test_figures_of_other_conditions_have_files_of_their_own(trained_home: Any) -> None:
    bundle = trained_home.root / "bundle"
    (bundle / "eval_data").mkdir(parents=True)
    (bundle / "core.yaml").write_text(
        "icl_tasks:\n- {label: ab, dataset_uri: ab.jsonl, num_fewshot: [0], "
        "icl_task_type: multiple_choice}\n"
    )
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nab,50\n")
    question = {"query": "Which?", "choices": ["a", "b"], "gold": 0}
    (bundle / "eval_data" / "ab.jsonl").write_text((json.dumps(question) + "\n") * 3)
    words = (*QUICK, "--eval", "core", "--dtype", "float32", "--max-per-task", "2")
    assert trained_home.run(*words, "--bundle", str(bundle)) == 0
    assert trained_home.run(*words, "--bundle", "offline") == 0
    assert trained_home.run(*words, "--bundle", "offline", "--max-length", "40") == 0
    names = sorted(path.name for path in trained_home.eval_dir("base", "tiny").iterdir())
    kept = load_bundle(bundle).fingerprint()[:8]
    assert names == [
        f"core_000004_max2_{kept}.json",
        "offline_000004_max2.json",
        "offline_000004_max2_length40.json",
    ]


def test_an_interruption_keeps_what_is_done(
    trained_home: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, ran = CoreEvaluation._run_task, []

    def interrupted(self: CoreEvaluation, scorer: Any, task: Any, report: Any) -> CoreTaskResult:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(task.label)
        return whole(self, scorer, task, report)

    monkeypatch.setattr(CoreEvaluation, "_run_task", interrupted)
    assert trained_home.run(*CAPPED) == 130
    directory = trained_home.eval_dir("base", "tiny")
    assert [path.name for path in directory.iterdir()] == ["offline_000004_max7.partial.json"]
    monkeypatch.setattr(CoreEvaluation, "_run_task", whole)
    capsys.readouterr()
    assert trained_home.run(*CAPPED) == 0
    assert f"resuming after {', '.join(ran)}\n" in capsys.readouterr().out
    first = results_of(trained_home, "offline_000004_max7.json")
    assert not (directory / "offline_000004_max7.partial.json").exists()
    assert trained_home.run(*CAPPED) == 0
    again = results_of(trained_home, "offline_000004_max7.json")
    assert [t["correct"] for t in again["tasks"]] == [t["correct"] for t in first["tasks"]]


def test_another_checkpoint_starts_over(
    trained_home: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = CoreEvaluation._run_task

    def interrupted(self: CoreEvaluation, scorer: Any, task: Any, report: Any) -> CoreTaskResult:
        if task.label == self.bundle.tasks[1].label:
            raise KeyboardInterrupt
        return whole(self, scorer, task, report)

    monkeypatch.setattr(CoreEvaluation, "_run_task", interrupted)
    assert trained_home.run(*CAPPED) == 130
    monkeypatch.setattr(CoreEvaluation, "_run_task", whole)
    capsys.readouterr()
    assert trained_home.run(*CAPPED, "--dtype", "bfloat16") == 0
    assert "resuming after" not in capsys.readouterr().out


def test_bits_per_byte_of_one_split_and_of_a_text(
    trained_home: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "some.txt"
    text.write_text("abc def ghi\njklm nop\n" * 30)
    words = ("eval", "base", "--eval", "bpb", "--device", "cpu", "--split-tokens", "512")
    words = (*words, "--device-batch-size", "4", "--json", str(tmp_path / "figures.json"))
    assert trained_home.run(*words, "--text", str(text)) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())["bits_per_byte"]
    assert list(figures) == [str(text)]
    assert figures[str(text)] > 0
    assert "some.txt" in capsys.readouterr().out
    assert trained_home.run(*words, "--split", "val", "--text", str(text)) == 0
    both = json.loads((tmp_path / "figures.json").read_text())["bits_per_byte"]
    assert list(both) == ["val", str(text)]
    assert both[str(text)] == figures[str(text)]


def test_a_small_split_is_measured_once_and_the_time_left_is_shown(
    trained_home: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """36 KB of validation text were measured again and again, up to 524,288 tokens."""
    monkeypatch.setattr("archerchat.console.PLAIN_LINE_SECONDS", 0.0)
    documents = [f"the words of number {number} " * 9 for number in range(40)]
    write_shards(documents, tmp_path / "x", documents_per_shard=20)
    held = Tokenizer.load(trained_home.tokenizer_dir("tiny")).encode_batch(documents[20:])
    words = ("eval", "base", "--eval", "bpb", "--device", "cpu", "--data", str(tmp_path / "x"))
    measured = []
    for rows in ("4", "32", "512"):
        assert trained_home.run(*words, "--device-batch-size", rows) == 0
        output = capsys.readouterr().out
        measured += re.findall(r"^ *val +[\d.]+ +([\d,]+) ", output, re.M)
        assert re.search(r"^val bits per byte \| \d+% \| about \d+ s left$", output, re.M)
    row, total = 64, sum(map(len, held))
    for count in measured:
        assert total - 2 * row < int(count.replace(",", "")) <= total, (measured, total)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(
    trained_home: Any, run_ranks: Callable[..., Any]
) -> None:
    assert trained_home.run(*CAPPED) == 0
    alone = results_of(trained_home, "offline_000004_max7.json")
    done = run_ranks(trained_home, 2, CAPPED)
    assert done.returncode == 0, done.stderr[-3000:]
    together = results_of(trained_home, "offline_000004_max7.json")
    for one, other in zip(alone["tasks"], together["tasks"], strict=True):
        for name in ("label", "examples", "correct", "prompt_tokens", "tokens_run", "near_ties"):
            assert one[name] == other[name]
    assert done.stdout.count("95 % interval") == 1
