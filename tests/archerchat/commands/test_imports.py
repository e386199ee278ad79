"""`archerchat import nanochat` leaves a checkpoint and a tokenizer that belong together."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
import tyro
from tests.archerchat.conftest import to_nanochat_names

from archerchat.checkpoint import find_checkpoint, find_model, load_checkpoint
from archerchat.commands.imports import ImportNanochatConfig, import_nanochat
from archerchat.dial import LearningRates
from archerchat.errors import ArcherChatError, CheckpointError, TokenizerError, UsageError
from archerchat.exchange.nanochat import BUFFERS
from archerchat.home import Home
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.optim.optimizer import Optimizer, build_groups
from archerchat.tokenizer.bpe import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

CONFIG = ModelConfig(
    sequence_length=16,
    vocab_size=265,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    model_dim=32,
    window_pattern="L",
)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The reference's own layout: a checkpoint two levels down, the tokenizer beside."""
    directory = tmp_path / "nanochat" / "base_checkpoints" / "d2"
    directory.mkdir(parents=True)
    torch.manual_seed(0)
    state = to_nanochat_names(Transformer(CONFIG).state_dict())
    torch.save(state, directory / "model_000050.pt")
    config = {
        "sequence_len": 16,
        "vocab_size": 265,
        "n_layer": 2,
        "n_head": 2,
        "n_kv_head": 1,
        "n_embd": 32,
        "window_pattern": "L",
    }
    meta = {"step": 50, "val_bpb": 1.5, "model_config": config}
    (directory / "meta_000050.json").write_text(json.dumps(meta))
    write_tokenizer(tmp_path / "nanochat" / "tokenizer")
    return directory


def write_tokenizer(directory: Path, extra: tuple[bytes, ...] = ()) -> None:
    ranks = {bytes([value]): value for value in range(256)}
    ranks |= {token: 256 + i for i, token in enumerate(extra)}
    encoding = tiktoken.Encoding(
        "rustbpe",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)},
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))


def test_flags_have_the_documented_names() -> None:
    given = ["DIR", "--tokenizer", "T", "--tag", "d20", "--step", "5", "--stage", "sft"]
    positional = (tyro.conf.PositionalRequiredArgs,)
    config = tyro.cli(ImportNanochatConfig, args=given, config=positional)
    assert config == ImportNanochatConfig(Path("DIR"), Path("T"), 5, tag="d20", stage="sft")


def test_a_model_and_its_tokenizer_arrive(
    home: Home, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_nanochat(ImportNanochatConfig(source), home)
    checkpoint = load_checkpoint(find_checkpoint(find_model(home, "base", None)))
    tokenizer = Tokenizer.load(home.tokenizer_dir("d2"))
    assert checkpoint.step == 50
    assert checkpoint.meta["model_config"] == asdict(CONFIG)
    assert checkpoint.meta["tokenizer"] == {"name": "d2", "fingerprint": tokenizer.fingerprint}
    assert checkpoint.meta["stage"] == "base"
    assert str(source / "model_000050.pt") in checkpoint.meta["source"]
    assert checkpoint.meta["nanochat_meta"]["val_bpb"] == 1.5
    torch.manual_seed(0)
    for name, tensor in Transformer(CONFIG).state_dict().items():
        assert torch.equal(checkpoint.state["model"][name], tensor)
    assert "imported step 50: 2 layers, width 32" in capsys.readouterr().out


def test_without_a_tokenizer_the_model_still_arrives(
    home: Home, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nanochat" / "tokenizer" / "tokenizer.pkl").unlink()
    import_nanochat(ImportNanochatConfig(source, tag="other", stage="rl"), home)
    checkpoint = load_checkpoint(find_checkpoint(home.checkpoint_dir("rl", "other")))
    assert checkpoint.meta["tokenizer"] is None
    assert "no tokenizer.pkl was found" in capsys.readouterr().out
    assert not (home.root / "tokenizers").exists()


def test_two_stages_share_a_tokenizer(home: Home, source: Path) -> None:
    import_nanochat(ImportNanochatConfig(source), home)
    import_nanochat(ImportNanochatConfig(source, stage="sft"), home)
    assert find_model(home, "sft", None).name == "d2"


def save_optimizer(source: Path) -> dict[str, Any]:
    """Write random moments as one rank of the reference has them; return them as ours."""
    transformer = Transformer(CONFIG)
    rates = LearningRates(*[0.1] * 7)
    optimizer, numbers = Optimizer(transformer, build_groups(transformer, rates)), count()
    state: dict[int, dict[str, Any]] = {}
    groups = [{"params": [next(numbers) for _ in each.names]} for each in optimizer.groups]
    for their_group, group in zip(groups, optimizer.groups, strict=True):
        for number, name in zip(their_group["params"], group.names, strict=True):
            for theirs, ours in BUFFERS.items():
                if (buffer := optimizer.state.get(f"{ours}.{name}")) is not None:
                    buffer.normal_()
                    state.setdefault(number, {"step": 50})[theirs] = buffer
    torch.save({"state": state, "param_groups": groups}, source / "optim_000050_rank0.pt")
    return optimizer.state_dict() | {"steps_taken": 50}


def test_the_optimizers_state_arrives_and_is_whole(home: Home, source: Path) -> None:
    expected = save_optimizer(source)
    import_nanochat(ImportNanochatConfig(source, tag="d2"), home)
    path = find_checkpoint(find_model(home, "base", "d2"))
    state = load_checkpoint(path, sections=("optimizer",)).state["optimizer"]
    assert state.keys() == expected.keys()
    assert state["steps_taken"] == 50
    assert all(torch.equal(state[name], expected[name]) for name in state if "." in name)
    (source / "optim_000050_rank0.pt").rename(source / "optim_000050_rank1.pt")
    with pytest.raises(CheckpointError, match=r"optim_000050_rank\*\.pt do not fit the model"):
        import_nanochat(ImportNanochatConfig(source, tag="other"), home)
    assert not home.checkpoint_dir("base", "other").exists()


def test_a_taken_tag_is_refused(home: Home, source: Path) -> None:
    import_nanochat(ImportNanochatConfig(source), home)
    with pytest.raises(UsageError, match="base model 'd2' already exists"):
        import_nanochat(ImportNanochatConfig(source), home)
    Tokenizer({bytes([i]): i for i in range(256)}, pattern=r"\w+").save(home.tokenizer_dir("new"))
    with pytest.raises(UsageError, match="holds a different tokenizer: choose another --tag"):
        import_nanochat(ImportNanochatConfig(source, tag="new"), home)


@pytest.mark.parametrize("damage", ["model", "tokenizer", "other tokenizer", "no tokenizer"])
def test_nothing_is_written_when_anything_is_wrong(
    home: Home, source: Path, tmp_path: Path, damage: str
) -> None:
    place = tmp_path / "given"
    error: type[ArcherChatError] = UsageError
    write_tokenizer(place)
    if damage == "model":
        error = CheckpointError
        (source / "model_000050.pt").write_bytes(b"broken")
    elif damage == "tokenizer":
        error = TokenizerError
        (place / "tokenizer.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    elif damage == "other tokenizer":
        write_tokenizer(place, extra=(b"th",))
    else:
        (place / "tokenizer.pkl").unlink()
    with pytest.raises(error):
        import_nanochat(ImportNanochatConfig(source, tokenizer=place), home)
    assert not home.root.exists()


def test_a_full_disk_leaves_no_half_import(
    home: Home, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr("archerchat.commands.imports.save_checkpoint", fail)
    with pytest.raises(CheckpointError, match="disk is full"):
        import_nanochat(ImportNanochatConfig(source), home)
    assert not home.tokenizer_dir("d2").exists()


def test_a_tag_that_is_a_path_is_refused(home: Home, source: Path) -> None:
    with pytest.raises(UsageError, match="cannot be a directory's name"):
        import_nanochat(ImportNanochatConfig(source, tag="../d2"), home)
