"""Parameter and FLOP counts of a shape (SPEC section 1), without building the model."""

from __future__ import annotations

from dataclasses import dataclass

from archerchat.model.config import ModelConfig

SMEAR_CHANNELS = 24
VALUE_GATE_CHANNELS = 12


@dataclass(frozen=True)
class ParameterCounts:
    """Count parameters by their role in the scaling rules."""

    embedding: int
    value_embeddings: int
    unembedding: int
    block_matrices: int
    """Value-embedding gates included."""
    scalars: int
    """The lambdas and the smear gate."""

    @property
    def total(self) -> int:
        return (
            self.embedding
            + self.value_embeddings
            + self.unembedding
            + self.block_matrices
            + self.scalars
        )

    @property
    def scaling(self) -> int:
        """P of the scaling rules: block matrices and the unembedding."""
        return self.block_matrices + self.unembedding


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Count what `Transformer(config)` would allocate."""
    c, v = config.model_dim, config.padded_vocab_size
    gated = sum(config.has_value_embedding(i) for i in range(config.num_layers))
    block = 2 * c * c + 2 * c * config.kv_dim + 8 * c * c
    return ParameterCounts(
        embedding=v * c,
        value_embeddings=gated * v * config.kv_dim,
        unembedding=v * c,
        block_matrices=config.num_layers * block
        + gated * config.num_kv_heads * VALUE_GATE_CHANNELS,
        scalars=2 * config.num_layers * config.residual_lambdas
        + (SMEAR_CHANNELS + 1) * config.smear
        + config.backout,
    )


def flops_per_token(config: ModelConfig) -> int:
    """Count the FLOPs of forward and backward for one trained token."""
    counts = count_parameters(config)
    attention = sum(
        12 * config.num_heads * config.head_dim * min(window, config.sequence_length)
        for window in config.windows
    )
    return 6 * (counts.scaling + SMEAR_CHANNELS * config.smear) + attention
