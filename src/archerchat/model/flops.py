"""Parameter and FLOP counts of a shape (SPEC section 1), without building the model."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from archerchat.model.config import SMEAR_CHANNELS, VALUE_GATE_CHANNELS, ModelConfig


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
        return sum(astuple(self))

    @property
    def scaling(self) -> int:
        """P of the scaling rules: block matrices and the unembedding."""
        return self.block_matrices + self.unembedding


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Count what `Transformer(config)` would allocate."""
    c, v = config.model_dim, config.padded_vocab_size
    gated = sum(map(config.has_value_embedding, range(config.num_layers)))
    block = 2 * c * c + 2 * c * config.kv_dim + 8 * c * c
    gates = gated * config.num_kv_heads * VALUE_GATE_CHANNELS
    lambdas = 2 * config.num_layers * config.residual_lambdas + config.smear + config.backout
    return ParameterCounts(
        embedding=v * c,
        value_embeddings=gated * v * config.kv_dim,
        unembedding=v * c,
        block_matrices=config.num_layers * block + gates,
        scalars=lambdas + SMEAR_CHANNELS * config.smear,
    )


def flops_per_token(config: ModelConfig) -> int:
    """Count the FLOPs of forward and backward for one trained token."""
    linear = count_parameters(config).scaling + SMEAR_CHANNELS * config.smear
    seen = sum(min(window, config.sequence_length) for window in config.windows)
    return 6 * linear + 12 * config.model_dim * seen
