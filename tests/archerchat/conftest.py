"""The reference's two small models, with our names, for every test that runs one."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from archerchat.model.attention import Backend
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.nanochat_import import CONFIG_NAMES, to_archerchat_names


@dataclass(frozen=True)
class ModelGolden:
    """One of the oracle's models: what it is and what the reference computed with it."""

    config: ModelConfig
    weights: dict[str, Tensor]
    """Float32, under our names."""
    io: dict[str, Tensor]
    """Inputs, targets, logits, losses, activations; gradients under the reference's names."""
    facts: dict[str, Any]
    """The JSON beside it: counts, FLOPs, generations, gradient statistics."""

    def build(self, dtype: torch.dtype = torch.float32, backend: Backend = "matmul") -> Transformer:
        """Return the model with these weights."""
        model = Transformer(self.config, dtype, backend)
        model.load_state_dict(self.weights)
        return model


@pytest.fixture(scope="session")
def load_model_golden(oracle_dir: Path) -> Callable[[str], ModelGolden]:
    """Load a model golden by its name, once a session."""

    @functools.cache
    def load(name: str) -> ModelGolden:
        facts = json.loads((oracle_dir / f"{name}.json").read_text())
        scales = facts["int8_scales"]
        stored = load_file(oracle_dir / f"{name}.safetensors")
        weights = {k: tensor.float() * scales.get(k, 1.0) for k, tensor in stored.items()}
        return ModelGolden(
            config=ModelConfig(**{CONFIG_NAMES[k]: v for k, v in facts["config"].items()}),
            weights=to_archerchat_names(weights),
            io=load_file(oracle_dir / f"{name}_io.safetensors"),
            facts=facts,
        )

    return load


@pytest.fixture(scope="session", params=["model_a", "model_b_gqa"])
def model_golden(
    request: pytest.FixtureRequest, load_model_golden: Callable[[str], ModelGolden]
) -> ModelGolden:
    """Each model golden in turn; the second has grouped queries and a padded vocabulary."""
    return load_model_golden(request.param)
