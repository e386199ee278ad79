"""What the benchmarks run: the reference's trained model and its tokenizer, or random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from archerchat.exchange.nanochat import to_archerchat_names
from archerchat.model.attention import choose_backend
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.runtime import Runtime
from archerchat.tokenizer.bpe import Tokenizer, load_ranks

GOLDEN_CONFIG = ModelConfig(256, 4096, 4, 2, 2, 128)
"""Shape of the oracle's trained model."""
NOISE = 0.02


def load_golden_tokenizer(oracle: Path) -> Tokenizer:
    return Tokenizer(load_ranks(oracle / "tokenizer" / "mergeable_ranks.tiktoken"))


def load_golden_weights(file: Path) -> dict[str, Tensor]:
    """Return the reference's weights in float32, by our names."""
    weights = to_archerchat_names(load_file(file))
    return {name: tensor.float() for name, tensor in weights.items()}


def load_golden_model(oracle: Path, runtime: Runtime) -> Transformer:
    """Load the reference's trained model for inference."""
    model = _plain_model(GOLDEN_CONFIG, runtime)
    model.load_state_dict(load_golden_weights(oracle / "train_final.safetensors"))
    return _for_inference(model, runtime)


def draw_model(config: ModelConfig, runtime: Runtime, *, seed: int, noise_seed: int) -> Transformer:
    """Draw a model for inference whose next tokens differ clearly.

    The output projections start at zero: noise on every weight gives them something to do.
    """
    model = _plain_model(config, runtime)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(noise_seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=NOISE)
    return _for_inference(model, runtime)


def _plain_model(config: ModelConfig, runtime: Runtime) -> Transformer:
    backend, _ = choose_backend(runtime.device, runtime.compute_dtype)
    return Transformer(config, runtime.compute_dtype, backend)


def _for_inference(model: Transformer, runtime: Runtime) -> Transformer:
    return model.to(runtime.device).eval().requires_grad_(False)
