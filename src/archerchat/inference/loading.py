"""Load a model with its tokenizer, and put its weights in the form that inference wants.

In training a linear layer keeps float32 masters and casts them at each use. A decoding step uses
each weight once, for a few rows, so the cast would cost more than the product. The inference model
has its matrices cast already. On CPUs bfloat16 ones are also packed in the order that oneDNN's
kernels read, where this torch can (docs/LOG.md has figures).
"""

from __future__ import annotations

import math
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archerchat.checkpoint import Checkpoint, find_checkpoint, find_model, load_checkpoint
from archerchat.config import DeviceConfig
from archerchat.errors import CheckpointError, TokenizerError, UsageError
from archerchat.home import Home
from archerchat.model.attention import choose_backend
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Linear, Transformer
from archerchat.runtime import Runtime, build_runtime, prepare_process
from archerchat.tokenizer.bpe import Tokenizer

MIN_PACKED = 64
"""Fewest rows and columns of a packed matrix. Gates are smaller, and read the smear's by name."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference, its tokenizer, and the checkpoint that they come from."""

    model: Transformer
    tokenizer: Tokenizer
    path: Path
    step: int
    meta: dict[str, Any]

    @property
    def tag(self) -> str:
        return self.path.parent.name


@dataclass(frozen=True)
class ModelOptions(DeviceConfig):
    """Options of commands that load a model."""

    model_tag: str | None = None
    """Name of the model. Defaults to the one saved last."""
    step: int | None = None
    """Step of the checkpoint to load. Defaults to the latest."""

    def load(self, home: Home, stage: str) -> tuple[LoadedModel, Runtime]:
        """Prepare this process, load the model and say which; raises as `load_model` does."""
        runtime = build_runtime(self.device, self.dtype)
        prepare_process(runtime)
        loaded = load_model(home, runtime, stage, self.model_tag, self.step)
        if runtime.is_master:  # on standard error, since an answer may go to a file
            why = "" if self.model_tag else " (the model saved last; --model-tag names another)"
            print(f"model: {loaded.path}{why}", file=sys.stderr, flush=True)
        return loaded, runtime


def load_model(
    home: Home, runtime: Runtime, stage: str, tag: str | None, step: int | None = None
) -> LoadedModel:
    """Load a model, by default the one saved last, and the tokenizer that it was trained with.

    Raises:
        UsageError: there is no such model or step, or it was imported without a tokenizer.
        CheckpointError: the checkpoint is damaged.
        TokenizerError: its tokenizer is missing, or was replaced since.
    """
    directory = find_model(home, stage, tag)
    checkpoint = load_checkpoint(find_checkpoint(directory, step), sections=("model",))
    config = read_model_config(checkpoint)
    backend, _ = choose_backend(runtime.device, runtime.compute_dtype)
    model = Transformer(config, runtime.compute_dtype, backend)
    try:
        model.load_state_dict(checkpoint.state["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.path} does not hold a model: {error!r}") from error
    tokenizer = find_model_tokenizer(home, checkpoint)
    model.to(runtime.device).eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, checkpoint.path, checkpoint.step, checkpoint.meta)


def read_model_config(checkpoint: Checkpoint) -> ModelConfig:
    """Return the shape of a checkpoint's model, or raise `CheckpointError` if it has none."""
    try:
        return ModelConfig(**checkpoint.meta["model_config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path} does not hold a model: {error!r}") from error


def read_bits_per_byte(path: Path) -> float | None:
    """Return the bits per byte that a checkpoint's training measured last; None if it did not."""
    try:
        value = load_checkpoint(path, sections=("loop",)).state["loop"].get("last_val", math.nan)
    except CheckpointError:  # imported, or damaged
        return None
    return value if math.isfinite(value) and path.parent.parent.name != "rl" else None


def find_model_tokenizer(home: Home, checkpoint: Checkpoint) -> Tokenizer:
    """Load the tokenizer that a checkpoint's model was trained with; raises as `load_model`."""
    named = checkpoint.meta.get("tokenizer")
    if named is None:
        raise UsageError(
            f"{checkpoint.path} was imported without its tokenizer: import it with --tokenizer DIR"
        )
    tokenizer = Tokenizer.load(home.tokenizer_dir(named["name"]))
    if tokenizer.fingerprint != named["fingerprint"]:
        raise TokenizerError(
            f"tokenizer {named['name']!r} is not the one that {checkpoint.path} was trained with: "
            "restore the old one, or train the model again"
        )
    return tokenizer


class CastLinear(Linear):
    """A linear layer whose weight is cast once, and packed on request."""

    def __init__(self, source: Linear, dtype: torch.dtype, packed: bool) -> None:
        nn.Module.__init__(self)
        self.packed = packed
        self._source = (source.weight,)  # a tuple keeps it from being a parameter here
        self.register_buffer("weight", source.weight.detach().to(dtype), persistent=False)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the source's values; in place unless packed, as captured graphs read them there."""
        (weight,) = self._source
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(torch.bfloat16), None)
        else:
            self.weight.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            return super().forward(x)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return product


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch packs such matrices and computes the same with them."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    layer = Linear(64, 64)
    x = torch.arange(128, dtype=torch.bfloat16).view(2, 64) / 64
    try:
        packed = CastLinear(layer, dtype, packed=True)(x)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.allclose(packed, F.linear(x, layer.weight.to(x.dtype)), atol=0.05)


def build_inference_model(source: Transformer) -> Transformer:
    """Return a model in the form that computes fastest without gradients: the source in float32.

    Embeddings and scalars stay shared with the source.
    """
    if source.compute_dtype == torch.float32:
        return source
    packs = can_pack(source.device, source.compute_dtype)
    model = deepcopy(source, {id(p): p for p in source.parameters()})
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear):
            packed = packs and min(layer.weight.shape) >= MIN_PACKED
            model.set_submodule(name, CastLinear(layer, source.compute_dtype, packed))
    return model


def refresh_weights(model: Transformer) -> None:
    """Copy the source's weights into its inference model after they have changed."""
    for module in model.modules():
        if isinstance(module, CastLinear):
            module.refresh()
