"""The reference's files become ours tensor by tensor, and hostile ones run nothing."""

from __future__ import annotations

import base64
import builtins
import json
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from safetensors.torch import load_file
from tests.archerchat.conftest import to_nanochat_names
from torch import Tensor

from archerchat.errors import CheckpointError, TokenizerError, UsageError
from archerchat.exchange import nanochat
from archerchat.exchange.nanochat import (
    load_model,
    load_tokenizer,
    to_archerchat_names,
)
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.tokenizer.bpe import SPECIAL_TOKENS, SPLIT_PATTERN

CONFIG = ModelConfig(
    sequence_length=32,
    vocab_size=300,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    model_dim=32,
    window_pattern="SL",
)
THEIR_CONFIG = {
    "sequence_len": 32,
    "vocab_size": 300,
    "n_layer": 3,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 32,
    "window_pattern": "SL",
}


def their_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ours = Transformer(CONFIG, compute_dtype=torch.bfloat16).state_dict()
    random = {n: torch.randn(t.shape, generator=generator).to(t.dtype) for n, t in ours.items()}
    return to_nanochat_names(random)


def write_checkpoint(
    directory: Path,
    step: int = 100,
    state: object = None,
    model_config: object = THEIR_CONFIG,
    **meta: Any,
) -> None:
    directory.mkdir(exist_ok=True)
    torch.save(their_state() if state is None else state, directory / f"model_{step:06d}.pt")
    content = {"step": step, "model_config": model_config} | meta
    (directory / f"meta_{step:06d}.json").write_text(json.dumps(content))


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


def test_every_tensor_arrives_under_our_name_bit_for_bit(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, val_bpb=0.9)
    model = load_model(tmp_path)
    assert (model.step, model.config, model.lacking) == (100, CONFIG, ())
    assert model.meta["val_bpb"] == 0.9
    state = their_state()
    assert model.tensors.keys() == to_archerchat_names(state).keys()
    for name, tensor in to_archerchat_names(state).items():
        assert model.tensors[name].dtype == tensor.dtype
        assert torch.equal(model.tensors[name], tensor)
    value = "blocks.2.attention.value_gate.weight"
    assert torch.equal(model.tensors[value], state["transformer.h.2.attn.ve_gate.weight"])
    assert model.tensors["value_embeddings.0.weight"].dtype == torch.bfloat16
    Transformer(CONFIG).load_state_dict(model.tensors)


def test_a_compiled_model_in_bfloat16_becomes_float32_except_its_tables(tmp_path: Path) -> None:
    state = {f"_orig_mod.{name}": tensor.bfloat16() for name, tensor in their_state().items()}
    write_checkpoint(tmp_path, state=state)
    tensors = load_model(tmp_path).tensors
    tables = {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16}
    assert tables == {
        "token_embedding.weight",
        "value_embeddings.0.weight",
        "value_embeddings.2.weight",
    }
    assert torch.equal(tensors["unembedding.weight"], state["_orig_mod.lm_head.weight"].float())


def test_parts_that_older_checkpoints_lack_are_switched_off(tmp_path: Path) -> None:
    newer = ("resid_lambdas", "x0_lambdas", "smear_lambda", "smear_gate.weight", "backout_lambda")
    config = {name: value for name, value in THEIR_CONFIG.items() if name != "window_pattern"}
    write_checkpoint(tmp_path, state=without(their_state(), *newer), model_config=config)
    model = load_model(tmp_path, qk_gain=1.0)
    assert (model.config.window_pattern, model.config.qk_gain) == ("L", 1.0)
    assert model.lacking == ("smear", "backout", "residual_lambdas")
    assert model.config.value_embeddings
    Transformer(model.config).load_state_dict(model.tensors)


def test_the_latest_step_is_the_default(tmp_path: Path) -> None:
    for step in (100, 2000, 300):
        write_checkpoint(tmp_path, step)
    (tmp_path / "optim_009000_rank0.pt").touch()
    assert load_model(tmp_path).step == 2000
    assert load_model(tmp_path, 300).step == 300
    with pytest.raises(UsageError, match=r"no step 5 in .*; it holds 100, 300, 2000"):
        load_model(tmp_path, 5)
    with pytest.raises(UsageError, match=r"no model_<step>\.pt"):
        load_model(tmp_path / "missing")


def test_missing_and_unknown_tensors_are_listed(tmp_path: Path) -> None:
    state = without(their_state(), "lm_head.weight", "transformer.h.1.mlp.c_fc.weight")
    write_checkpoint(tmp_path, state=state)
    with pytest.raises(CheckpointError, match=r"lacks blocks\.1\.mlp\.up\.weight, unembedding\.w"):
        load_model(tmp_path)
    write_checkpoint(tmp_path, state=their_state() | {"transformer.wpe.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"unknown tensors: transformer\.wpe\.weight"):
        load_model(tmp_path)
    extra = {"value_embeds.1.weight": torch.zeros(320, 16)}
    write_checkpoint(tmp_path, state=their_state() | extra)
    with pytest.raises(CheckpointError, match=r"also has value_embeddings\.1\.weight"):
        load_model(tmp_path)


def test_wrong_shapes_and_dtypes_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, state=their_state() | {"lm_head.weight": torch.zeros(300, 32)})
    with pytest.raises(CheckpointError, match=r"unembedding\.weight has shape \[300, 32\].*320"):
        load_model(tmp_path)
    write_checkpoint(tmp_path, state=their_state() | {"x0_lambdas": torch.zeros(3).double()})
    with pytest.raises(CheckpointError, match=r"input_lambdas is torch\.float64"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_layer": 3}, "sequence_len is missing"),
        (THEIR_CONFIG | {"rope_base": 10}, "has the unknown rope_base"),
        (THEIR_CONFIG | {"n_head": 3}, "model_dim 32 must be an even multiple"),
        (THEIR_CONFIG | {"n_head": 4.0}, "n_head is 4.0, which is not int"),
        (THEIR_CONFIG | {"n_layer": True}, "n_layer is True, which is not int"),
        (None, "cannot read .*meta_000100.json"),
    ],
)
def test_a_config_that_is_not_the_models_is_explained(
    tmp_path: Path, config: object, message: str
) -> None:
    write_checkpoint(tmp_path, model_config=config)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04broken", b"\x80\x04K\x01."])
def test_a_broken_model_file_is_named(tmp_path: Path, content: bytes) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model_000100.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model_000100\.pt: not a readable state dict"):
        load_model(tmp_path)


def test_a_file_without_a_state_dict_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, state=[torch.zeros(1)])
    with pytest.raises(CheckpointError, match="does not hold a state dict"):
        load_model(tmp_path)
    (tmp_path / "meta_000100.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*meta_000100\.json"):
        load_model(tmp_path)


def test_the_oracles_model_can_be_imported(oracle_dir: Path, tmp_path: Path) -> None:
    description = json.loads((oracle_dir / "model_a.json").read_text())
    scales = description["int8_scales"]
    state = {
        name: tensor.float() * scales.get(name, 1.0)
        for name, tensor in load_file(oracle_dir / "model_a.safetensors").items()
    }
    write_checkpoint(tmp_path, state=state, model_config=description["config"])
    model = load_model(tmp_path)
    for name, tensor in to_nanochat_names(model.tensors).items():
        assert torch.equal(tensor, state[name])
    loaded = Transformer(model.config)
    loaded.load_state_dict(model.tensors)
    golden = load_file(oracle_dir / "model_a_io.safetensors")
    with torch.inference_mode():
        logits = loaded(golden["ids"][:1])[0, golden["logits_positions"].long()]
    torch.testing.assert_close(logits, golden["logits_row0"], atol=1e-4, rtol=1e-4)


def encoding(
    specials: dict[str, int] | None = None, extra: tuple[bytes, ...] = (b"th", b"the")
) -> tiktoken.Encoding:
    ranks = {bytes([value]): value for value in range(256)}
    ranks |= {token: 256 + i for i, token in enumerate(extra)}
    names = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding(
        "rustbpe",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens=names if specials is None else specials,
    )


def write_pickle(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_pickled_encoding_becomes_our_tokenizer(tmp_path: Path, protocol: int) -> None:
    theirs = encoding()
    ours = load_tokenizer(write_pickle(tmp_path / "tokenizer.pkl", theirs, protocol))
    text = "the theatre's 1234 naïve\r\n  words <|bos|>"
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.vocab_size == theirs.n_vocab == 267
    assert ours.special_id("<|output_end|>") == 266


def test_the_oracles_vocabulary_survives_the_pickle(oracle_dir: Path, tmp_path: Path) -> None:
    lines = (oracle_dir / "tokenizer" / "mergeable_ranks.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    names = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    theirs = tiktoken.Encoding(
        "rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=names
    )
    ours = load_tokenizer(write_pickle(tmp_path / "tokenizer.pkl", theirs))
    goldens = json.loads((oracle_dir / "tokenizer_goldens.json").read_text())
    text = json.dumps(goldens)[:2000]
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.vocab_size == 4096


class Calls:
    """Pickles as a call, the way every exploit does."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.call


def state_with(**changes: object) -> bytes:
    """Pickle an encoding whose state is tampered with."""
    theirs = encoding()
    state = dict(theirs.__getstate__()) | changes  # type: ignore[call-overload]
    tampered = pickle.dumps(state, protocol=4)[2:-1]
    named = b"\x8c\x0dtiktoken.core\x8c\x08Encoding\x93"
    return b"\x80\x04" + named + b")\x81" + tampered[9:] + b"b."


def hostile(marker: str) -> dict[str, bytes]:
    """Pickles that would make the file `marker`, or harm otherwise, if they were believed."""
    command = f"touch {marker}"
    named = b"\x8c\x0dtiktoken.core\x8c\x08Encoding\x93"
    return {
        "os.system": pickle.dumps(Calls(os.system, command), protocol=4),
        "old protocol": b"cos\nsystem\n(S'" + command.encode() + b"'\ntR.",
        "inst": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "eval": pickle.dumps(Calls(builtins.eval, f"open({marker!r}, 'w')"), protocol=4),
        "getattr": pickle.dumps(Calls(getattr, Calls(__import__, "os"), "system"), protocol=4),
        "nested in the ranks": state_with(mergeable_ranks={b"a": Calls(os.system, command)}),
        "nested in the name": state_with(name=Calls(os.system, command)),
        "a global without a call": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        "dotted global": b"\x80\x04\x8c\x0dtiktoken.core\x8c\x11Encoding.__init__\x93.",
        "stand-in called": b"\x80\x04" + named + b")R.",
        "stand-in with arguments": b"\x80\x04" + named + b"\x8c\x01a\x85\x81.",
        "state of the class itself": b"\x80\x04" + named + b"}b.",
        "item of the stand-in": b"\x80\x04" + named + b")\x81K\x00K\x01s.",
        "class of the stand-in": b"\x80\x04" + named + b".",
        "persistent id": b"\x80\x04\x8c\x01aQ.",
        "extension": b"\x80\x04\x82\x01.",
        "memo of 32 GiB": b"\x80\x04}r\xff\xff\xff\x7f.",
        "bytes longer than the file": b"\x80\x04B\xff\xff\xff\x7fabc.",
        "stack underflow": b"\x80\x04s.",
        "truncated": pickle.dumps(encoding(), protocol=4)[:-20],
        "empty": b"",
        "text": b"not a pickle at all\n",
        "dict": pickle.dumps({"name": "x"}, protocol=4),
    }


@pytest.mark.parametrize("name", hostile(""))
def test_hostile_and_broken_pickles_run_nothing(tmp_path: Path, name: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "tokenizer.pkl"
    path.write_bytes(hostile(str(marker))[name])
    with pytest.raises(TokenizerError, match=r"tokenizer\.pkl"):
        load_tokenizer(path)
    assert not marker.exists()
    assert nanochat._EncodingState.state is None


@pytest.mark.parametrize("name", ["os.system", "old protocol", "inst", "eval"])
def test_the_same_pickles_are_dangerous_elsewhere(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    pickle.loads(hostile(str(marker))[name])
    assert marker.exists()


def test_the_unpickler_alone_refuses_foreign_names_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = {opcode.name for opcode in pickletools.opcodes}
    monkeypatch.setattr(nanochat, "ALLOWED_OPCODES", every)
    marker, path = tmp_path / "marker", tmp_path / "tokenizer.pkl"
    for name, content in hostile(str(marker)).items():
        if name.startswith("memo"):
            continue  # what only the list of opcodes stops
        path.write_bytes(content)
        with pytest.raises(TokenizerError):
            load_tokenizer(path)
        assert not marker.exists(), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (state_with(pat_str=3), "tokenizer.pkl"),
        (state_with(mergeable_ranks="a"), "tokenizer.pkl"),
        (state_with(mergeable_ranks={}), "special tokens' ids do not follow"),
        (state_with(mergeable_ranks={"a": 0}), "tokenizer.pkl"),
        (state_with(mergeable_ranks={b"a": None}), "opcode NONE"),
        (state_with(special_tokens={"<|bos|>": 0}), "special tokens' ids do not follow"),
        (state_with(special_tokens={"<|eot|>": 258}), "bos"),
        (state_with(pat_str="("), "does not compile"),
        (state_with(explicit_n_vocab=3), "does not hold what a tiktoken encoding consists of"),
    ],
)
def test_an_encoding_that_is_not_ours_to_run_is_explained(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(path)


def test_a_registered_encoding_has_no_ranks_to_import(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.pkl"
    named = b"\x8c\x0dtiktoken.core\x8c\x08Encoding\x93"
    path.write_bytes(b"\x80\x04" + named + b")\x81\x8c\x04gpt2b.")
    with pytest.raises(TokenizerError, match="only names tiktoken's encoding 'gpt2'"):
        load_tokenizer(path)


def test_files_that_are_missing_or_huge_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TokenizerError, match="cannot read"):
        load_tokenizer(tmp_path / "tokenizer.pkl")
    path = write_pickle(tmp_path / "tokenizer.pkl", encoding())
    monkeypatch.setattr(nanochat, "LARGEST_TOKENIZER", 1000)
    with pytest.raises(TokenizerError, match="larger than"):
        load_tokenizer(path)
