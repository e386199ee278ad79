"""A Hugging Face folder is written whole, comes back bit for bit, and bad ones are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.archerchat.conftest import TinyHome
from torch import Tensor

from archerchat.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from archerchat.exchange.huggingface import INDEX, PLAIN, WEIGHTS
from archerchat.home import Home
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.tokenizer.bpe import Tokenizer


def weights(home: Home, stage: str, tag: str) -> dict[str, Tensor]:
    path = find_checkpoint(home.checkpoint_dir(stage, tag))
    return load_checkpoint(path, sections=("model",)).state["model"]


def save_model(home: Home, tag: str, config: ModelConfig, dtype: torch.dtype) -> None:
    """Save a model of random weights, every one of which matters."""
    torch.manual_seed(0)
    model = Transformer(config, dtype)
    state = {name: torch.randn(t.shape).to(t.dtype) for name, t in model.state_dict().items()}
    fingerprint = Tokenizer.load(home.tokenizer_dir("tiny")).fingerprint
    about = {"name": "tiny", "fingerprint": fingerprint}
    meta = {"model_config": asdict(config), "tokenizer": about, "stage": "base"}
    save_checkpoint(home.checkpoint_dir("base", tag), 7, {"model": state}, meta)


SHAPE = ModelConfig(256, 360, 3, 4, 2, 64, "SL")
PLAIN_SHAPE = replace(SHAPE, **PLAIN, window_pattern="L")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_folder_comes_back_bit_for_bit(
    tiny_home: TinyHome, tmp_path: Path, dtype: torch.dtype
) -> None:
    save_model(tiny_home, "one", SHAPE, dtype)
    assert tiny_home.run("export", "huggingface", "one", str(tmp_path / "hf")) == 0
    assert tiny_home.run("import", "huggingface", str(tmp_path / "hf"), "--tag", "two") == 0
    before, after = weights(tiny_home, "base", "one"), weights(tiny_home, "base", "two")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    meta = load_checkpoint(find_checkpoint(tiny_home.checkpoint_dir("base", "two")), ()).meta
    assert meta["model_config"] == asdict(SHAPE)
    loaded = Tokenizer.load(tiny_home.tokenizer_dir("two"))
    assert loaded.fingerprint == Tokenizer.load(tiny_home.tokenizer_dir("tiny")).fingerprint


def test_a_plain_model_becomes_the_librarys_and_comes_back(
    tiny_home: TinyHome, tmp_path: Path
) -> None:
    """Only the rows beyond the vocabulary, which no token uses, are zeros then."""
    save_model(tiny_home, "one", PLAIN_SHAPE, torch.float32)
    assert tiny_home.run("export", "huggingface", "one", str(tmp_path / "hf")) == 0
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (content["model_type"], content["rope_parameters"]["rope_theta"]) == ("nanochat", 1e5)
    assert not list((tmp_path / "hf").glob("*.py"))
    assert load_file(tmp_path / "hf" / WEIGHTS)["lm_head.weight"].shape == (360, 64)
    assert tiny_home.run("import", "huggingface", str(tmp_path / "hf"), "--tag", "two") == 0
    before, after = weights(tiny_home, "base", "one"), weights(tiny_home, "base", "two")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        rows = 360 if tensor.size(0) == 384 else None
        assert torch.equal(after[name][:rows], tensor[:rows]), name


def test_a_model_that_the_library_lacks_is_not_written_as_its(
    trained_home: TinyHome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "huggingface", "tiny", str(tmp_path / "hf"), "--format", "transformers"]
    assert trained_home.run(*words) == 2
    said = capsys.readouterr().err
    for part in ("value_embeddings", "smear", "backout", "residual_lambdas", "qk_gain (1.2)"):
        assert part in said
    assert not (tmp_path / "hf").exists()


def test_the_card_has_what_training_and_evaluations_left(
    trained_home: TinyHome, tmp_path: Path
) -> None:
    options = {"max_per_task": None, "max_length": None}
    task = {"label": "arc_easy", "task_type": "multiple_choice", "random_baseline": 0.25}
    tasks = [task | {"correct": 2, "examples": 4, "seconds": 1.0}]
    result = {"step": 4, "core": 0.3333, "tasks": tasks, "options": options}
    path = trained_home.eval_dir("base", "tiny") / "core_000004.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))
    assert trained_home.run("export", "huggingface", "tiny", str(tmp_path / "hf")) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    for line in ("| Tokens | 2,048 |", "| Data | tiny |", "| Stage | base, step 4 |"):
        assert line in card
    assert "## CORE 0.3333" in card
    assert "| arc_easy | 0.5000 | 0.150 to 0.850 | 4 | 0.25 |" in card
    assert 'from_pretrained("hf", trust_remote_code=True)' in card


def test_a_directory_that_is_not_empty_is_refused(
    trained_home: TinyHome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("kept")
    assert trained_home.run("export", "huggingface", "tiny", str(tmp_path)) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "kept"
    words = ["export", "huggingface", "tiny", str(tmp_path / "hf"), "--dtype", "float16"]
    assert trained_home.run(*words) == 2
    assert "overflow" in capsys.readouterr().err


def change_json(name: str, **values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return damage


def lose_a_shard(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(state)}
    first = {name: state[name] for name, file in names.items() if file == "model-0.safetensors"}
    save_file(first, folder / "model-0.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def change_tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return damage


def swap_ids(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def split_digits(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits"})


def add_spaces(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True


def repeat_a_name(content: Any) -> None:
    first, last = content["added_tokens"][0], content["added_tokens"][-1]
    content["added_tokens"].append(first | {"id": last["id"] + 1})


def write_index(content: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(json.dumps(content))


BAD = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "a shard": (lose_a_shard, "model-1.safetensors"),
    "cut": (lambda folder: (folder / WEIGHTS).write_bytes(b"12345678" * 9), "missing or damaged"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "architecture": (change_json("config.json", model_type="llama"), "'llama'"),
    "other ids": (change_tokenizer(swap_ids), "its ids differ"),
    "merges": (change_tokenizer(lambda c: c["model"]["merges"].reverse()), "differs in merges"),
    "dropout": (change_tokenizer(lambda c: c["model"].update(dropout=0.1)), "differs in dropout"),
    "unigram": (change_tokenizer(lambda c: c["model"].update(type="Unigram")), "differs in type"),
    "a name twice": (change_tokenizer(repeat_a_name), "differs in added_tokens"),
    "vocab": (change_tokenizer(lambda c: c["model"].update(vocab=[])), "tokenizer.json cannot"),
    "digits": (change_tokenizer(split_digits), "differs in pre_tokenizer"),
    "spaces": (change_tokenizer(add_spaces), "differs in pre_tokenizer"),
    "index": (write_index({}), "missing or damaged"),
    "index list": (write_index({"weight_map": []}), "missing or damaged"),
    "index number": (write_index({"weight_map": {"a": 1}}), "missing or damaged"),
    "vocabulary": (change_json("config.json", vocab_size=361), "360 tokens and the model 361"),
    "float layers": (change_json("config.json", num_hidden_layers=2.0), "is 2.0, which is not int"),
    "word": (change_json("config.json", smear="no"), "smear is 'no', which is not bool"),
    "list": (change_json("config.json", window_pattern=["S", "L"]), "which is not str"),
    "step": (change_json("config.json", archerchat={"step": -1}), "has the step -1"),
    "true step": (change_json("config.json", archerchat={"step": True}), "has the step True"),
    "shape": (change_json("config.json", num_hidden_layers=5), "tensors are not those of"),
}


@pytest.fixture(scope="module")
def folder(trained_template: TinyHome, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "hf"
    assert trained_template.run("export", "huggingface", "tiny", str(path)) == 0
    return path


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_named_and_leave_nothing(
    name: str,
    folder: Path,
    tiny_home: TinyHome,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage, reason = BAD[name]
    copy = shutil.copytree(folder, tmp_path / "bad")
    damage(copy)
    before = tiny_home.listing()
    assert tiny_home.run("import", "huggingface", str(copy)) == 2
    assert reason in capsys.readouterr().err
    assert tiny_home.listing() == before


def test_an_empty_directory_is_filled_and_stays_the_same(
    trained_home: TinyHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a mount point, or the current directory."""
    (tmp_path / "hf").mkdir()
    monkeypatch.chdir(tmp_path / "hf")
    before = Path().stat().st_ino
    assert trained_home.run("export", "huggingface", "tiny", ".") == 0
    assert (tmp_path / "hf").stat().st_ino == before
    assert (tmp_path / "hf" / WEIGHTS).exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert not (tmp_path / "hf" / "part").exists()


def test_a_taken_name_is_refused_before_weights_are_read(
    trained_home: TinyHome, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(folder, tmp_path / "tiny")
    (copy / WEIGHTS).unlink()
    assert trained_home.run("import", "huggingface", str(copy)) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_nanochat_model_of_another_kind_is_refused(
    tiny_home: TinyHome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tiny_home, "one", PLAIN_SHAPE, torch.float32)
    assert tiny_home.run("export", "huggingface", "one", str(tmp_path / "hf")) == 0
    other = {"rope_type": "default", "rope_theta": 10000.0}
    change_json("config.json", rope_parameters=other)(tmp_path / "hf")
    assert tiny_home.run("import", "huggingface", str(tmp_path / "hf"), "--tag", "two") == 2
    said = capsys.readouterr().err
    assert "'rope_theta': 10000.0}; models here have" in said
