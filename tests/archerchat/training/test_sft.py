"""Whole fine-tuning runs of a tiny model, by the command that users type."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from archerchat.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from archerchat.optim.optimizer import AdamGroup
from archerchat.tasks.hub import TaskFiles
from archerchat.tasks.registry import MixtureConfig, build_mixtures
from archerchat.training.recipe import Recipe
from archerchat.training.sft import FinetuneConfig, Finetuning

Launch = Callable[[list[str]], Any]

RUN = {
    "mixture": "SimpleSpelling:120,Arithmetic:40",
    "model-tag": "tiny",
    "device": "cpu",
    "dtype": "float32",
    "compile": False,
    "eval-tokens": 2048,
    "eval-every": 20,
    "save-every": 10,
}


def words(**changes: object) -> list[str]:
    """Return a command of a fraction of a second; `changes` by flag."""
    given = {name.replace("_", "-"): value for name, value in changes.items()}
    made = ["sft"]
    for name, value in (RUN | given).items():
        if isinstance(value, bool):
            made.append(f"--{name}" if value else f"--no-{name}")
        else:
            made += [f"--{name}", str(value)]
    return made


def steps(home: Any, tag: str = "tiny") -> list[int]:
    return list_checkpoints(home.checkpoint_dir("sft", tag))


def summary(home: Any, run: str = "tiny-sft") -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((home.run_dir(run) / "summary.json").read_text())
    return figures


def test_a_run_learns_and_says_what_it_does(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained_home.run(*words(mixture="SimpleSpelling:400")) == 0
    output = capsys.readouterr().out
    for pattern in (
        r"^base +tiny, step 4; optimizer moments from the base model's step 4$",
        r"^mixture +400 conversations of SimpleSpelling$",
        r"^validation 256 conversations of SimpleSpelling$",
        r"^training +about \d\d steps of 512 tokens \(2 x 4 rows of 64\)$",
        r"^step 0: val/bpb \d+\.\d{4} ",
        r"^step 1/\d+ \([\d.]+ %\) \| loss 5\.\d+ \| lr x1\.000 \| ",
        r"^step (\d+)/\1 \(100\.0 %\) \| loss .* \| 0 s left$",
        r"^step \d+: 'Who are you\? ",
        r"^validation bits per byte: (\S+) -> (\S+) \(best \2\)$",
        r"^conversations: 4\d\d used \(1\.\d\d passes over the mixture\), \d+ truncated to a row, "
        r"\d+ dropped; [\d.]+ % of the positions are padding, ",
    ):
        assert re.search(pattern, output, re.M), pattern
    figures = summary(trained_home)
    assert figures["val_bpb"] < 0.75 * figures["val_bpb_first"]
    assert figures["tokens"] == figures["steps"] * 512
    assert figures["data/progress"] >= 1
    assert 0 < figures["data/padding_share"] < 0.5
    saved = load_checkpoint(find_checkpoint(trained_home.checkpoint_dir("sft", "tiny")), ("loop",))
    assert (saved.meta["stage"], saved.meta["finished"]) == ("sft", True)
    assert saved.state["loop"]["step"] == steps(trained_home)[-1] == figures["steps"]


def test_what_became_of_the_conversations_is_a_metric(trained_home: Any) -> None:
    assert trained_home.run(*words(num_iterations=3)) == 0
    (journal,) = (trained_home.run_dir("tiny-sft") / "journal").glob("*.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    steps = [record["values"] for record in records if "data/cut" in record.get("values", {})]
    assert [step["data/conversations"] for step in steps] == sorted(
        step["data/conversations"] for step in steps
    )
    assert len(steps) == 3
    figures = summary(trained_home)
    for name in ("cut", "dropped", "padding_share", "trained_share", "progress", "conversations"):
        assert steps[-1][f"data/{name}"] == figures[f"data/{name}"]
    assert 0 < figures["data/padding_share"] < 1
    assert 0 < figures["data/trained_share"] < 1


def test_a_finished_run_is_not_run_again(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained_home.run(*words()) == 0
    before = trained_home.listing()
    capsys.readouterr()
    assert trained_home.run(*words()) == 0
    assert trained_home.listing() == before
    assert re.fullmatch(
        r"model 'tiny' is already fine-tuned: step \d+ is in .*sft/tiny; "
        r"val/bpb \S+ -> \S+\n",
        capsys.readouterr().out,
    )


def test_steps_can_end_a_run_before_its_data(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained_home.run(*words(num_iterations=5)) == 0
    assert re.search(r"^conversations: \d+ used \(0\.\d\d passes", capsys.readouterr().out, re.M)
    assert steps(trained_home) == [5]
    assert summary(trained_home)["data/progress"] < 1


def test_steps_and_passes_go_beyond_one_pass(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a run of a few steps says how it gets more."""
    small = {"mixture": "SimpleSpelling:20"}
    assert trained_home.run(*words(**small, output_tag="one")) == 0
    output = capsys.readouterr().out
    (one,) = steps(trained_home, "one")
    assert re.search(
        r"^warning +too few steps to learn much; --num-epochs \d+ "
        r"--total-batch-size 256 would take about 50$",
        output,
        re.M,
    )
    assert trained_home.run(*words(**small, output_tag="forty", num_iterations=40)) == 0
    assert steps(trained_home, "forty")[-1] == 40
    assert trained_home.run(*words(**small, output_tag="three", num_epochs=3)) == 0
    assert 2 * one < steps(trained_home, "three")[-1] <= 3 * one
    output = capsys.readouterr().out
    assert re.search(r"used \([34]\.\d\d passes over the mixture\)", output)


def test_own_questions_are_answered(trained_home: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = words(num_iterations=1, eval_every=-1)
    assert trained_home.run(*run, "--sample-prompt", "Where is Rome?") == 0
    output = capsys.readouterr().out
    assert "step 1: 'Where is Rome? → " in output
    assert "Who are you?" not in output


def test_a_run_resumes_with_its_saved_settings(
    trained_home: Any, assert_same_run: Callable[..., None]
) -> None:
    """Even where the base model saved last is another one by now."""
    run = {"num_iterations": 4, "save_every": 2, "lr_scale": 0.5, "keep_last": 9}
    assert trained_home.run(*words(**run, output_tag="whole")) == 0
    assert trained_home.run(*words(**run, output_tag="again")) == 0
    assert trained_home.pretrain(model_tag="later", num_iterations=1) == 0
    assert trained_home.run("sft", "--resume", "again", "--resume-from-step", "2") == 0
    assert_same_run(*(trained_home.checkpoint_dir("sft", tag) for tag in ("whole", "again")))


def test_a_fine_tuned_model_is_sampled_by_its_source(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained_home.run(*words(num_iterations=2, output_tag="talks")) == 0
    capsys.readouterr()
    assert trained_home.run("sample", "--source", "sft", "--max-tokens", "2") == 0
    assert str(trained_home.checkpoint_dir("sft", "talks") / "step_000002") in (
        capsys.readouterr().err
    )


def build(home: Any, **changes: Any) -> Any:
    """Return a run's stage with its model."""
    config = FinetuneConfig(
        data=MixtureConfig(mixture="Arithmetic:60"),
        device="cpu", dtype="float32", compile=False, **changes,
    )  # fmt: skip
    stage = Finetuning(config, home)
    stage.build(None)
    return stage


def test_moments_go_on_and_rates_are_fresh(trained_home: Any) -> None:
    saved = load_checkpoint(find_checkpoint(trained_home.checkpoint_dir("base", "tiny")))
    warm, cold = build(trained_home), build(trained_home, warm_start=False)
    assert warm.optimizer.steps_taken == 4
    for name in warm.optimizer.state:
        tensor = saved.state["optimizer"][name]
        assert torch.equal(warm.optimizer.state[name], tensor)
        assert not cold.optimizer.state[name].any()
    base_rates = saved.meta["identity"]["learning_rates"]
    rates = {group.names[0]: group.rate for group in warm.optimizer.groups if group.names}
    assert rates["unembedding.weight"] == pytest.approx(0.8 * base_rates["unembedding"])
    for name, tensor in saved.state["model"].items():
        assert torch.equal(warm.model.state_dict()[name], tensor)


def test_nothing_decays_and_moments_that_are_missing_start_from_zero(
    trained_home: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = trained_home.checkpoint_dir("base", "tiny")
    saved = load_checkpoint(find_checkpoint(directory), sections=("model",))
    save_checkpoint(directory, 4, saved.state, saved.meta)
    stage = build(trained_home)
    adam = [group for group in stage.optimizer.groups if isinstance(group, AdamGroup)]
    assert len(adam) == 6
    assert all(group.weight_decay == 0 for group in adam)
    assert stage.optimizer.steps_taken == 0
    moments = "optimizer moments from zero: the base checkpoint has no optimizer state"
    assert moments in dict(stage.announce())["base"]


def test_masked_conversations_of_a_row_do_not_touch_each_other(trained_home: Any) -> None:
    plain, masked = build(trained_home), build(trained_home, document_masking=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the initial values hide half of the model
        for mine, other in zip(plain.model.parameters(), masked.model.parameters(), strict=True):
            mine += 0.1 * torch.randn(mine.shape, generator=generator)
            other.copy_(mine)
    bos = plain.tokenizer.bos_id
    row = torch.tensor([[bos, 5, 6, 7, bos, 8, 9, 10, bos, bos, bos]])
    alone = plain.hidden(row[:, 4:8])
    torch.testing.assert_close(masked.hidden(row)[:, 4:8], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain.hidden(row)[:, 4:8], alone, atol=1e-3)


def test_a_masked_run_learns(trained_home: Any) -> None:
    assert trained_home.run(*words(document_masking=True)) == 0
    figures = summary(trained_home)
    assert figures["val_bpb"] < figures["val_bpb_first"]


def test_a_run_can_go_back_to_an_older_checkpoint(
    trained_home: Any, assert_same_run: Callable[..., None]
) -> None:
    run = {"save_every": 5, "keep_last": 9, "num_iterations": 12}
    assert trained_home.run(*words(**run, output_tag="whole")) == 0
    assert trained_home.run(*words(**run, output_tag="again")) == 0
    assert trained_home.run(*words(**run, output_tag="again"), "--resume-from-step", "5") == 0
    assert_same_run(*(trained_home.checkpoint_dir("sft", tag) for tag in ("whole", "again")))


def test_a_run_that_takes_longer_than_estimated_announces_no_negative_time(
    trained_home: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = words(mixture="SimpleSpelling:60", num_epochs=1, save_every=1, keep_last=99)
    assert trained_home.run(*run) == 0
    *_, before_last, _ = steps(trained_home)
    monkeypatch.setattr(Finetuning, "total_steps", lambda stage, step: max(step, 2))
    capsys.readouterr()
    trained_home.run(*run, "--resume-from-step", str(before_last))
    assert "about -" not in capsys.readouterr().out


def test_a_changed_run_is_refused(trained_home: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert trained_home.run(*words(num_iterations=2)) == 0
    for change, message in (
        ({"mixture": "Arithmetic:50"}, "--mixture: 'SimpleSpelling:120,Arithmetic:40' saved, 'Ari"),
        ({"num_iterations": 4}, "--num-iterations: 2 saved, 4 now"),
        ({"lr_scale": 0.5}, "--lr-scale: 0.8 saved, 0.5 now"),
        ({"document_masking": True}, "--document-masking: False saved, True now"),
        ({"model_step": 2}, "--model-step: none saved, 2 now"),
    ):
        capsys.readouterr()
        assert trained_home.run(*words(**({"num_iterations": 2} | change))) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "--extend" not in error
        assert "by --resume tiny, choose another --output-tag for a new run, or start" in error


def test_a_signal_before_the_first_step_leaves_no_checkpoint(
    trained_home: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Recipe, "bits_per_byte", lambda recipe, batches: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert trained_home.run(*words()) == 130
    assert "; nothing is saved" in capsys.readouterr().out
    assert steps(trained_home) == []


def test_a_file_in_another_layout_is_learned_and_named(
    trained_home: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And the exported model's card says what it came from."""
    line = json.dumps({"instruction": "a b c", "input": "", "output": "d e f"})
    path, folder = tmp_path / "talks.jsonl", tmp_path / "hf"
    path.write_text(f"{line}\n" * 40)
    more = {"num_iterations": 2, "total_batch_size": 256, "sample_every": "none"}
    assert trained_home.run(*words(mixture="none", jsonl=path, **more)) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "talks.jsonl: 40 in Alpaca layout" in output
    assert trained_home.run("export", "huggingface", "tiny", str(folder)) == 0
    card = (folder / "README.md").read_text()
    assert "| Started from | base model tiny, step 4 |" in card
    assert "apply_chat_template" in card
    assert trained_home.run("report", "tiny", "--out", str(tmp_path / "report")) == 0
    report = (tmp_path / "report" / "report.md").read_text()
    assert re.search(r"; data: talks\.jsonl\b", report)
    assert "data: none" not in report


@pytest.mark.parametrize(
    ("count", "use"),
    [
        (40, "held back from training"),
        (20, "held back from training"),
        (12, "also trained on, because there are fewer than 20"),
    ],
)
def test_conversations_that_validate_for_want_of_others_are_named(
    trained_home: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, count: int, use: str
) -> None:
    path, turn = tmp_path / "talks.jsonl", {"role": "user", "content": "a b c"}
    lines = [json.dumps([turn, {"role": "assistant", "content": f"{i}"}]) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    more = {"num_iterations": 1, "total_batch_size": 256, "sample_every": "none"}
    assert trained_home.run(*words(mixture="none", jsonl=path, **more)) == 0
    output = " ".join(capsys.readouterr().out.split())
    kept = max(1, count // 20)
    found = re.search(
        rf" validation {kept} conversations? of talks.jsonl validation {kept} of the {count} in "
        rf"talks.jsonl \(number ([\d, ]+)\), {use}; choose others with --val-jsonl ",
        output,
    )
    assert found, output
    _, validation = build_mixtures(
        MixtureConfig(mixture="none", jsonl=(path,)), TaskFiles(tmp_path)
    )
    answers = [int(validation[index]["messages"][-1]["content"]) for index in range(kept)]
    assert found[1].split(", ") == [str(answer + 1) for answer in sorted(answers)]


@pytest.mark.parametrize(("tasks", "is_lost"), [("SimpleSpelling:500", True), ("identity", False)])
def test_own_conversations_that_the_mixture_drowns_get_a_warning(
    trained_home: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tasks: str,
    is_lost: bool,
) -> None:
    path = tmp_path / "talks.jsonl"
    turns = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d"}]
    path.write_text(f"{json.dumps(turns)}\n" * (4 if is_lost else 40))
    more = {"num_iterations": 1, "total_batch_size": 256, "sample_every": "none"}
    assert trained_home.run(*words(mixture=tasks, jsonl=path, **more)) == 0
    warned = (
        "your --jsonl is 4 of the 504 conversations: hardly any is learned. "
        "--mixture none trains on yours alone (docs/conversations.md)"
    )
    output = " ".join(capsys.readouterr().out.split())
    assert (warned in output) == is_lost
    assert ("your --jsonl" in output) == is_lost


# Bad input


def test_nonsense_is_refused(
    trained_home: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text('[{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]\n')
    for change, code, message in (
        ({"model_tag": "big"}, 2, "no base model 'big' under"),
        ({"mixture": "Alchemy"}, 2, "there is no task 'Alchemy'"),
        ({"num_iterations": 0}, 2, "--num-iterations is 0; it must be at least 1"),
        ({"device_batch_size": -2}, 2, "--device-batch-size is -2"),
        ({"total_batch_size": 100}, 2, "a batch of 100 tokens is not a multiple"),
        ({"lr_scale": "nan"}, 2, "--lr-scale is nan"),
        ({"jsonl": path}, 1, "talks.jsonl:1: message 1 (assistant): content is empty"),
        ({"jsonl": tmp_path / "no.jsonl"}, 2, "no.jsonl does not exist"),
        ({"data_dir": tmp_path, "mixture": "GSM8K"}, 1, "has no gsm8k/"),
    ):
        assert trained_home.run(*words(**change)) == code, change
        assert message in capsys.readouterr().err
    assert not trained_home.checkpoint_dir("sft", "tiny").exists()
