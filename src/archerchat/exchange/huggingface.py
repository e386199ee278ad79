"""Write a model as a Hugging Face folder that loads anywhere, and read such a folder.

There are two formats. The library's own `NanoChatForCausalLM` supports plain models only. Ours adds
`modeling_archerchat.py` to the folder, supports every model and keeps the tensors' names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from archerchat.errors import CheckpointError, UsageError
from archerchat.exchange.hf_tokenizer import MARK, TOKENIZER_FILE, tokenizer_json
from archerchat.exchange.weights import PARTS, ImportedModel, fit, parse_config, rename
from archerchat.files import (
    UNREADABLE,
    exclusive,
    fsync_path,
    new_directory,
    write_bytes,
    write_json,
)
from archerchat.model.config import ModelConfig
from archerchat.model.loss import LOGIT_CAP
from archerchat.model.transformer import NORM_EPSILON, ROTARY_BASE
from archerchat.tokenizer.bpe import Tokenizer

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
OURS, THEIRS = "archerchat", "nanochat"
"""The model types of the two formats."""
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "model_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "sequence_length",
}
NAMES = {
    "model.embed_tokens.weight": "token_embedding.weight",
    "model.layers.{i}.self_attn.q_proj.weight": "blocks.{i}.attention.query.weight",
    "model.layers.{i}.self_attn.k_proj.weight": "blocks.{i}.attention.key.weight",
    "model.layers.{i}.self_attn.v_proj.weight": "blocks.{i}.attention.value.weight",
    "model.layers.{i}.self_attn.o_proj.weight": "blocks.{i}.attention.output.weight",
    "model.layers.{i}.mlp.fc1.weight": "blocks.{i}.mlp.up.weight",
    "model.layers.{i}.mlp.fc2.weight": "blocks.{i}.mlp.down.weight",
    "lm_head.weight": "unembedding.weight",
}
PLAIN: dict[str, Any] = {**dict.fromkeys(PARTS, False), "qk_gain": 1.0}
"""Settings that a model needs for `NanoChatForCausalLM`, besides full windows."""
FIXED = {
    "hidden_act": "relu2",
    "attention_bias": False,
    "rms_norm_eps": NORM_EPSILON,
    "final_logit_softcapping": LOGIT_CAP,
    "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE},
    "tie_word_embeddings": False,
}
"""Settings with which `NanoChatForCausalLM` computes what our plain models do."""


def lost_parts(config: ModelConfig) -> list[str]:
    """Return the parts of a model that `NanoChatForCausalLM` lacks."""
    values = asdict(config)
    lost = [f"{name} ({values[name]})" for name, plain in PLAIN.items() if values[name] != plain]
    short = min(config.windows) < config.sequence_length
    return lost + [f"sliding windows ({config.window_pattern})"] * short


def write_folder(
    directory: Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    card: str,
    about: Mapping[str, Any],
    *,
    model_type: str = OURS,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the whole folder, or nothing. In an existing empty one config.json appears last.

    Args:
        tensors: the model's state dict.
        card: the text of README.md.
        about: stage, step and so on; config.json keeps them for the import.
        dtype: dtype of the weights; None keeps each as it is.

    Raises:
        UsageError: `directory` is not empty, or the format lacks a part of the model.
    """
    if model_type == THEIRS and (lost := lost_parts(config)):
        raise UsageError(
            f"transformers' NanoChatForCausalLM would silently drop {', '.join(lost)}: leave out "
            "--format, or train with `pretrain --preset transformers`"
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} is not empty: choose a new directory")
    if tokenizer.vocab_size != config.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}: "
            "export the model with its own"
        )
    state = {name: t if dtype is None else t.to(dtype) for name, t in tensors.items()}
    files = ["chat_template.jinja", "modeling_archerchat.py"]
    if model_type == THEIRS:
        files.pop()
        state = rename(state, {ours: theirs for theirs, ours in NAMES.items()})
        for table in ("model.embed_tokens.weight", "lm_head.weight"):  # there is no padding there
            state[table] = state[table][: config.vocab_size].clone()
    with _filled(directory) as temporary:
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        for name, content in _describe(config, tokenizer, about, model_type, dtype).items():
            write_json(temporary / name, content)
        for name in files:
            shutil.copy(Path(__file__).with_name(name), temporary)
        write_bytes(temporary / "README.md", card.encode())


@contextmanager
def _filled(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory whose files become those of `directory`, new or empty."""
    if not directory.exists():
        with new_directory(directory) as temporary:
            yield temporary
        return
    part = directory / "part"  # a mount point, or somebody's current directory, stays what it is
    with exclusive(directory):
        with new_directory(part) as temporary:
            yield temporary
        for file in sorted(part.iterdir(), key=lambda file: file.name == CONFIG):
            file.rename(directory / file.name)
        part.rmdir()
        fsync_path(directory)


def _describe(
    config: ModelConfig,
    tokenizer: Tokenizer,
    about: Mapping[str, Any],
    model_type: str,
    dtype: torch.dtype | None,
) -> dict[str, dict[str, Any]]:
    """Return the folder's JSON files by name."""
    values, bos, end = asdict(config), "<|bos|>", "<|assistant_end|>"
    content: dict[str, Any] = {theirs: values.pop(ours) for theirs, ours in SIZES.items()}
    content["dtype"] = str(dtype or torch.float32).removeprefix("torch.")
    if model_type == THEIRS:
        content |= FIXED | {"intermediate_size": 4 * config.model_dim}
        content["architectures"] = ["NanoChatForCausalLM"]
    else:
        content |= values | {"windows": config.windows, "tie_word_embeddings": False}
        content["architectures"] = ["ArcherChatForCausalLM"]
        names = {"AutoConfig": "Config", "AutoModelForCausalLM": "ForCausalLM"}
        own = "modeling_archerchat.ArcherChat"
        content["auto_map"] = {auto: own + name for auto, name in names.items()}
    ids = {name: tokenizer.special_id(name) for name in (bos, end)}
    ends = {"bos_token_id": ids[bos], "eos_token_id": [ids[end], ids[bos]]}
    # No padding id for the model: the library would give that row of the table no gradient.
    content |= ends | {"pad_token_id": None, "model_type": model_type, "archerchat": dict(about)}
    return {
        CONFIG: content,
        "generation_config.json": ends | {"pad_token_id": ids[bos], "max_new_tokens": 256},
        TOKENIZER_FILE: tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": MARK + bos,
            "eos_token": MARK + (bos if about.get("stage") == "base" else end),
            "pad_token": MARK + bos,
            "model_max_length": config.sequence_length,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        },
    }


def read_about(directory: Path) -> dict[str, Any]:
    """Return what an export recorded about its model; any other folder gives only step 0.

    Raises:
        UsageError: it has no configuration, or a step that is not a number.
    """
    about = _read_json(directory / CONFIG).get("archerchat")
    about = {"step": 0} | (about if isinstance(about, dict) else {})
    if type(about["step"]) is not int or about["step"] < 0:
        raise UsageError(
            f"{directory / CONFIG} has the step {about['step']!r}: export the model again"
        )
    return about


def read_folder(directory: Path) -> ImportedModel:
    """Read the model of a folder of either format; its tokenizer is `load_hf_tokenizer`'s.

    Raises:
        UsageError: the weights are missing or incomplete, or it is another architecture's.
    """
    about, content = read_about(directory), _read_json(directory / CONFIG)
    config = _parse_config(content, directory / CONFIG)
    state = _load_state(directory)
    try:
        if content["model_type"] == THEIRS:
            state = rename(state, NAMES)
            for table in ("token_embedding.weight", "unembedding.weight"):
                rows = config.padded_vocab_size - config.vocab_size
                if table in state and len(state[table]) == config.vocab_size:
                    state[table] = torch.nn.functional.pad(state[table], (0, 0, 0, rows))
        tensors = fit(state, config)
    except CheckpointError as error:
        raise UsageError(f"{directory}: {error}") from error
    return ImportedModel(directory, about["step"], config, tensors, (), about)


def _parse_config(content: Mapping[str, Any], path: Path) -> ModelConfig:
    kind = content.get("model_type")
    if kind not in (OURS, THEIRS):
        raise UsageError(
            f"{path} describes a model of type {kind!r}; only {OURS} and {THEIRS} can be imported"
        )
    try:
        if kind == OURS:
            return parse_config(content, SIZES | {n: n for n in (*PLAIN, "window_pattern")})
        config = parse_config(content, SIZES, **PLAIN, window_pattern="L")
        for name, value in (FIXED | {"intermediate_size": 4 * config.model_dim}).items():
            if content.get(name) != value:
                raise ValueError(f"{name} is {content.get(name)!r}; models here have {value!r}")
    except ValueError as error:
        raise UsageError(f"{path} cannot be imported: {error}") from error
    return config


def _load_state(directory: Path) -> dict[str, Tensor]:
    """Read the weights from one file, or from the shards that an index lists."""
    index = directory / INDEX
    state: dict[str, Tensor] = {}
    try:
        names = _read_json(index)["weight_map"].values() if index.exists() else [WEIGHTS]
        for name in sorted(set(names)):
            state |= load_file(directory / name)
    except (OSError, SafetensorError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(
            f"the weights in {directory} are missing or damaged ({error}): copy them again"
        ) from error
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except UNREADABLE as error:
        raise UsageError(f"cannot read {path} ({error}): give a Hugging Face folder") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} does not hold an object: give a Hugging Face folder")
    return content
