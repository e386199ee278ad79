"""The shape of one transformer (SPEC section 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

WINDOW_ALIGNMENT = 128
VOCAB_ALIGNMENT = 64
SMEAR_CHANNELS = 24
VALUE_GATE_CHANNELS = 12


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides which tensors a model has and what its forward computes.

    Raises:
        ValueError: the sizes contradict each other; the message names them.
    """

    sequence_length: int
    """Longest row trained on, T; windows are derived from it."""
    vocab_size: int
    """Tokens that the tokenizer knows, special ones included; tables are padded beyond it."""
    num_layers: int
    """Transformer blocks, L."""
    num_heads: int
    """Query heads, H."""
    num_kv_heads: int
    """Key/value heads, K; H is a multiple of K."""
    model_dim: int
    """Width, C = H * D."""
    window_pattern: str = "SSSL"
    """Tiled over the layers: L sees the whole sequence, S a quarter; the last is always L."""
    value_embeddings: bool = True
    """Whether every second layer adds an embedding of the token to its values."""
    smear: bool = True
    """Whether each token's embedding takes in part of the one before it."""
    backout: bool = True
    """Whether part of the middle layer's stream is subtracted at the end."""
    residual_lambdas: bool = True
    """Whether each layer weighs the residual stream and adds the model's input to it."""
    qk_gain: float = 1.2
    """Factor on normalised queries and on keys."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "vocab_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.model_dim % self.num_heads or (self.model_dim // self.num_heads) % 2:
            raise ValueError(
                f"model_dim {self.model_dim} must be an even multiple of num_heads {self.num_heads}"
            )
        if self.smear and self.model_dim < SMEAR_CHANNELS:
            raise ValueError(f"model_dim is {self.model_dim}; the smear gate reads 24 channels")
        if self.value_embeddings and self.model_dim < VALUE_GATE_CHANNELS:
            raise ValueError(f"model_dim is {self.model_dim}; value gates read 12 channels")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if not 0 < self.qk_gain < math.inf:
            raise ValueError(f"qk_gain is {self.qk_gain}; it must be positive and finite")
        if not self.window_pattern or set(self.window_pattern) - {"S", "L"}:
            raise ValueError(
                f"window_pattern {self.window_pattern!r} may hold only the letters S and L"
            )

    @property
    def head_dim(self) -> int:
        """D."""
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """K * D."""
        return self.num_kv_heads * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """V, as every table and parameter count has it."""
        return math.ceil(self.vocab_size / VOCAB_ALIGNMENT) * VOCAB_ALIGNMENT

    @property
    def windows(self) -> tuple[int, ...]:
        """For each layer the w such that a query at t sees keys t-w .. t."""
        long = self.sequence_length
        short = math.ceil(long / 4 / WINDOW_ALIGNMENT) * WINDOW_ALIGNMENT
        pattern = self.window_pattern
        letters = [pattern[i % len(pattern)] for i in range(self.num_layers)]
        letters[-1] = "L"
        return tuple(long if letter == "L" else short for letter in letters)

    def has_value_embedding(self, layer: int) -> bool:
        """Whether `layer` mixes a value embedding into its values."""
        return self.value_embeddings and layer % 2 == (self.num_layers - 1) % 2
