"""Read names, shapes and the configuration of a model, for imports of every format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archerchat.errors import CheckpointError
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer

PARTS = ("value_embeddings", "smear", "backout", "residual_lambdas")
"""Parts that a model may lack: their switches in the configuration, which tensors begin with."""


@dataclass(frozen=True)
class ImportedModel:
    """Another project's model, with our names and shapes."""

    path: Path
    step: int
    config: ModelConfig
    tensors: dict[str, Tensor]
    lacking: tuple[str, ...]
    """Parts of a model that the file lacks; they are switched off in `config`."""
    meta: dict[str, Any]
    """Other data of the source."""


def parse_config(given: Mapping[str, Any], names: Mapping[str, str], **others: Any) -> ModelConfig:
    """Build a configuration from another project's settings.

    Args:
        names: their name of each setting, and ours.
        others: settings that the other project does not have.

    Raises:
        ValueError: a value is missing, has a wrong type, or contradicts the others.
    """
    kinds = {field.name: str(field.type) for field in fields(ModelConfig)}
    for theirs, ours in names.items():
        if theirs not in given:
            raise ValueError(f"{theirs} is missing")
        if type(given[theirs]).__name__ != kinds[ours]:
            raise ValueError(f"{theirs} is {given[theirs]!r}, which is not {kinds[ours]}")
    return ModelConfig(**{ours: given[theirs] for theirs, ours in names.items()}, **others)


def rename(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename tensors by a table whose {i} is a layer, or raise `CheckpointError` for others."""
    renamed, unknown = {}, []
    for name, tensor in state.items():
        layer = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = name.replace(f".{layer[0]}.", ".{i}.") if layer else name
        if pattern in names:
            renamed[names[pattern].format(i=layer[0] if layer else "")] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"unknown tensors: {listed(unknown)}; is this another model's file?")
    return renamed


def listed(names: Iterable[str], most: int = 8) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + rest


def fit(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Check names, shapes and dtypes; return float32, but bfloat16 tables as they are."""
    with torch.device("meta"):
        expected = Transformer(config).state_dict()
    missing, unexpected = expected.keys() - state, state.keys() - expected
    if unexpected or missing:
        raise CheckpointError(
            f"its tensors are not those of {config}: it lacks {listed(missing) or 'none'} and also "
            f"has {listed(unexpected) or 'none'} (our names)"
        )
    tensors = {}
    for name, wanted in expected.items():
        tensor = state[name]
        if tensor.shape != wanted.shape:
            raise CheckpointError(
                f"{name} has shape {list(tensor.shape)}; {config} implies {list(wanted.shape)}"
            )
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise CheckpointError(f"{name} is {tensor.dtype}; weights are float32 or bfloat16")
        is_table = name.startswith(("token_embedding.", "value_embeddings."))
        keep = is_table and tensor.dtype == torch.bfloat16
        tensors[name] = tensor if keep else tensor.float()
    return tensors
