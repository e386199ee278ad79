"""Read checkpoints and tokenizers of nanochat, the reference implementation.

Its checkpoint is a directory with `model_<step>.pt` (a state dict) and `meta_<step>.json`; its
tokenizer is a pickled `tiktoken.Encoding`. Nothing that these files hold is ever called: the
state dict goes through `torch.load(weights_only=True)`, and the tokenizer through an unpickler
that knows a handful of opcodes and one class, a stand-in of ours that only keeps its state.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archerchat.dial import LearningRates
from archerchat.errors import CheckpointError, TokenizerError, UsageError
from archerchat.exchange.weights import PARTS, ImportedModel, fit, listed, parse_config, rename
from archerchat.files import UNREADABLE
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.optim.optimizer import Optimizer, build_groups
from archerchat.tokenizer.bpe import Tokenizer

NAMES = {
    "transformer.wte.weight": "token_embedding.weight",
    "transformer.h.{i}.attn.c_q.weight": "blocks.{i}.attention.query.weight",
    "transformer.h.{i}.attn.c_k.weight": "blocks.{i}.attention.key.weight",
    "transformer.h.{i}.attn.c_v.weight": "blocks.{i}.attention.value.weight",
    "transformer.h.{i}.attn.c_proj.weight": "blocks.{i}.attention.output.weight",
    "transformer.h.{i}.attn.ve_gate.weight": "blocks.{i}.attention.value_gate.weight",
    "transformer.h.{i}.mlp.c_fc.weight": "blocks.{i}.mlp.up.weight",
    "transformer.h.{i}.mlp.c_proj.weight": "blocks.{i}.mlp.down.weight",
    "lm_head.weight": "unembedding.weight",
    "value_embeds.{i}.weight": "value_embeddings.{i}.weight",
    "resid_lambdas": "residual_lambdas",
    "x0_lambdas": "input_lambdas",
    "smear_gate.weight": "smear_gate.weight",
    "smear_lambda": "smear_lambda",
    "backout_lambda": "backout_lambda",
}
"""The reference's name of each tensor, and ours; {i} is the layer."""

CONFIG_NAMES = {
    "sequence_len": "sequence_length",
    "vocab_size": "vocab_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_kv_head": "num_kv_heads",
    "n_embd": "model_dim",
    "window_pattern": "window_pattern",
}
BUFFERS = {
    "exp_avg": "mean",
    "exp_avg_sq": "square",
    "momentum_buffer": "momentum",
    "second_momentum_buffer": "variance",
}
"""The reference's name of each buffer of its optimizer, and ours."""
MODEL_FILE = re.compile(r"model_(\d{6,})\.pt")

TOKENIZER_FILE = "tokenizer.pkl"
LARGEST_TOKENIZER = 16 * 2**20
"""Bytes; a vocabulary of 200,000 tokens takes about 3 MiB."""
ENCODING_STATE = {"name", "pat_str", "mergeable_ranks", "special_tokens"}
ALLOWED_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "STACK_GLOBAL"),
    *("EMPTY_TUPLE", "NEWOBJ", "BUILD", "EMPTY_DICT", "SETITEM", "SETITEMS", "SHORT_BINUNICODE"),
    *("BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BININT", "BININT1", "BININT2"),
}
"""The opcodes of a pickled `tiktoken.Encoding` since protocol 4, the default; none is a call."""


def to_archerchat_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the reference's state dict, compiled or not, to ours."""
    return rename({name.removeprefix("_orig_mod."): t for name, t in state.items()}, NAMES)


def load_model(
    directory: Path, step: int | None = None, qk_gain: float = ModelConfig.qk_gain
) -> ImportedModel:
    """Read one of the reference's checkpoints; the latest for None.

    Args:
        qk_gain: factor on queries and keys, which nanochat's files do not record.

    Raises:
        UsageError: `directory` holds no checkpoint, or none of this step.
        CheckpointError: a file is broken, or its tensors are not those its config implies.
    """
    names = (path.name for path in directory.glob("model_*.pt"))
    paths = {int(m[1]): m.string for m in map(MODEL_FILE.fullmatch, names) if m}
    if not paths:
        raise UsageError(f"no model_<step>.pt in {directory}: give nanochat's checkpoint directory")
    if step is not None and step not in paths:
        steps = ", ".join(map(str, sorted(paths)))
        raise UsageError(f"no step {step} in {directory}; it holds {steps}")
    step = max(paths) if step is None else step
    path = directory / paths[step]
    meta, config = _load_meta(directory / f"meta_{step:06d}.json")
    try:
        content = _load_file(path)
        pairs = content.items() if isinstance(content, dict) else [(None, None)]
        if not all(isinstance(name, str) and isinstance(t, Tensor) for name, t in pairs):
            raise CheckpointError("it does not hold a state dict of named tensors")
        state = to_archerchat_names(content)
        lacking = tuple(part for part in PARTS if not any(name.startswith(part) for name in state))
        off: dict[str, Any] = dict.fromkeys(lacking, False)
        config = replace(config, qk_gain=qk_gain, **off)
        tensors = fit(state, config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return ImportedModel(path, step, config, tensors, lacking, meta)


def _load_meta(path: Path) -> tuple[dict[str, Any], ModelConfig]:
    """Return a checkpoint's metadata and the shape of its model."""
    try:
        meta = json.loads(path.read_bytes())
        given = {"window_pattern": "L", **meta["model_config"]}
        if unknown := given.keys() - CONFIG_NAMES:
            raise ValueError(f"it has the unknown {listed(unknown)}, of another version")
        return meta, parse_config(given, CONFIG_NAMES)
    except (*UNREADABLE, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read {path} as nanochat's model_config ({error}): copy it from the source"
        ) from error


def _load_file(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken or hostile file can fail anywhere in the reader
        first_line = str(error).partition("\n")[0]
        raise CheckpointError(f"not a readable state dict ({first_line})") from error


def load_optimizer(model: ImportedModel) -> dict[str, Any]:
    """Read the optimizer's state that was saved with a model, one file per rank.

    A rank has its rows of a large table, or its matrices of a stack, the last ones padding.

    Returns:
        The state as `Optimizer.load_state_dict` takes it; empty where there are no files.

    Raises:
        CheckpointError: a file is broken or missing, or does not fit the model.
    """
    stem = str(model.path.parent / f"optim_{model.step:06d}_rank")
    count = len(list(model.path.parent.glob(f"optim_{model.step:06d}_rank*.pt")))
    if not count:
        return {}
    with torch.device("meta"):
        transformer = Transformer(model.config)
        rates = LearningRates(*[0.0] * len(fields(LearningRates)))
        optimizer = Optimizer(transformer, build_groups(transformer, rates))
    state: dict[str, Any] = {}
    try:
        ranks = [_load_file(Path(f"{stem}{rank}.pt")) for rank in range(count)]
        groups = zip(ranks[0]["param_groups"], optimizer.groups, strict=True)
        pairs = [p for their, our in groups for p in zip(their["params"], our.names, strict=True)]
        for (index, name), (theirs, ours) in product(pairs, BUFFERS.items()):
            if (key := f"{ours}.{name}") in optimizer.state:
                parts = [rank["state"][index][theirs].float() for rank in ranks]
                state[key] = _joined(parts, optimizer.state[key].shape)
        state["steps_taken"] = int(ranks[0]["state"][pairs[0][0]].get("step", model.step))
    except (CheckpointError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{stem}*.pt do not fit the model ({error}): copy them again, or move them away to "
            "import the weights alone"
        ) from error
    return state


def _joined(parts: list[Tensor], shape: torch.Size) -> Tensor:
    """Return a buffer from the parts of all ranks, or from the first if each has all of it."""
    whole = parts[0] if parts[0].numel() == shape.numel() else torch.cat(parts)[: shape[0]]
    return whole.reshape(shape).clone()


class _EncodingState:
    """Replace `tiktoken.Encoding` while unpickling: keep the state, do nothing."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _EncodingUnpickler(pickle.Unpickler):
    """Admit one class by name, and return its replacement."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _EncodingState
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not admitted")


def load_tokenizer(path: Path) -> Tokenizer:
    """Read the reference's pickled tokenizer without running anything that it names.

    Raises:
        TokenizerError: the file is missing, too large, holds anything but a tiktoken encoding,
            or one that is not ours to run (see `Tokenizer`).
    """
    try:
        state = _load_encoding(path)
        ranks, specials = state["mergeable_ranks"], state["special_tokens"]
        if sorted(specials.values()) != list(range(len(ranks), len(ranks) + len(specials))):
            raise TokenizerError("the special tokens' ids do not follow the ranks")
        return Tokenizer(
            ranks,
            pattern=state["pat_str"],
            special_tokens=sorted(specials, key=specials.__getitem__),
            provenance={"source": "nanochat", "path": str(path)},
        )
    except (TokenizerError, AttributeError, TypeError, ValueError) as error:  # or of other types
        raise TokenizerError(f"{path}: {error}") from error


def _load_encoding(path: Path) -> dict[str, Any]:
    """Return the state of the pickled encoding, whose parts may be of any type."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_TOKENIZER + 1)
    except OSError as error:
        raise TokenizerError(f"cannot read it: {error.strerror}") from error
    if len(content) > LARGEST_TOKENIZER:
        raise TokenizerError(f"larger than {LARGEST_TOKENIZER:,} bytes: not a tokenizer")
    try:
        for opcode, _, position in pickletools.genops(content):
            if opcode.name not in ALLOWED_OPCODES:
                raise pickle.UnpicklingError(f"opcode {opcode.name} at byte {position}")
        encoding = _EncodingUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a broken or hostile file can fail anywhere in the reader
        raise TokenizerError(f"no pickled tiktoken encoding, so not run: {error}") from error
    state = encoding.state if isinstance(encoding, _EncodingState) else None
    if isinstance(state, str):
        raise TokenizerError(f"it only names tiktoken's encoding {state!r}, without its ranks")
    if not isinstance(state, dict) or state.keys() != ENCODING_STATE:
        raise TokenizerError("it does not hold what a tiktoken encoding consists of")
    return state
