"""The depth dial: one number decides every other hyperparameter (SPEC section 1).

Width, heads, horizon, batch, learning rates, weight decay and iterations follow from the depth.
Each can be overridden, and what depends on it follows. These are pure functions from a
`DialConfig` and a vocabulary size to frozen results: nothing here looks at a device.

The rates were tuned at depth 12; other depths scale them:

- The horizon is a multiple of the parameters, as in Chinchilla (https://arxiv.org/abs/2203.15556).
- The batch grows with the horizon (Power Lines, https://arxiv.org/abs/2505.13738).
- Rates grow with the square root of the batch (https://arxiv.org/abs/2205.10287).
- Weight decay keeps B / (rate * decay * horizon), AdamW's time scale as a share of the run,
  constant (https://arxiv.org/abs/2405.13698).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from archerchat.config import (
    Config,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from archerchat.errors import UsageError
from archerchat.model.config import ModelConfig
from archerchat.model.flops import ParameterCounts, count_parameters, flops_per_token

REFERENCE_DEPTH = 12
"""Depth at which the base rates were tuned, with the next two."""
REFERENCE_BATCH_TOKENS = 2**19
REFERENCE_MODEL_DIM = 768
BATCH_EXPONENT = 0.383
"""The best batch grows as tokens^0.383: Power Lines, https://arxiv.org/abs/2505.13738."""
RESIDUAL_RATE_RATIO = 0.01
SMEAR_RATE = 0.2


@dataclass(frozen=True)
class DialConfig(Config):
    """Set the depth, and override what follows from it."""

    depth: PositiveInt
    """Number of transformer layers. Everything you do not set is derived from it."""
    aspect_ratio: PositiveInt = 64
    """Model width per layer, before rounding up to whole heads."""
    head_dim: PositiveInt = 128
    """Width of one attention head."""
    num_kv_heads: PositiveInt | None = None
    """Key/value heads for grouped-query attention. Defaults to as many as query heads."""
    max_seq_len: PositiveInt = 2048
    """Tokens per training row."""
    window_pattern: str = "SSSL"
    """Attention windows, repeated over the layers: L is the whole row, S a quarter. The last layer
    always has L."""
    value_embeddings: bool = True
    """Add an embedding of the token to the attention values of every second layer."""
    smear: bool = True
    """Mix part of the previous token's embedding into each token's."""
    backout: bool = True
    """Subtract part of the middle layer's output from the last layer's."""
    residual_lambdas: bool = True
    """Learn, per layer, how much of the residual stream and of the model's input to keep."""
    qk_gain: PositiveFloat = 1.2
    """Factor on normalised queries and on keys."""
    preset: Literal["nanochat", "transformers"] = "nanochat"
    """`transformers` switches off what the transformers library's NanoChat model lacks: the five
    options above, and windows."""
    num_iterations: PositiveInt | None = None
    """Optimizer steps. Overrides --target-flops and --target-param-data-ratio."""
    target_flops: PositiveFloat | None = None
    """FLOPs to train with. Overrides --target-param-data-ratio."""
    target_param_data_ratio: PositiveFloat = 12.0
    """Training tokens per scaling parameter (block matrices and unembedding)."""
    total_batch_size: PositiveInt | None = None
    """Tokens per optimizer step, over all ranks. Defaults to what suits the number of tokens."""
    embedding_lr: NonNegativeFloat = 0.3
    """Base learning rate of the embedding; value embeddings get half of it (AdamW)."""
    unembedding_lr: NonNegativeFloat = 0.008
    """Base learning rate of the unembedding (AdamW)."""
    matrix_lr: NonNegativeFloat = 0.02
    """Base learning rate of the matrices inside the blocks (Muon)."""
    scalar_lr: NonNegativeFloat = 0.5
    """Base learning rate of the residual scalars (AdamW)."""
    weight_decay: NonNegativeFloat = 0.28
    """Base weight decay of the matrices inside the blocks (Muon)."""
    warmup_steps: NonNegativeInt = 40
    """Steps over which the learning rate rises."""
    warmdown_ratio: Fraction = 0.65
    """Share of the steps over which the learning rate falls at the end."""
    final_lr_frac: Fraction = 0.05
    """Share of the peak learning rate that is left after the last step."""


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rate of each optimizer group (SPEC section 3), all scales applied."""

    unembedding: float
    embedding: float
    value_embedding: float
    residual_lambdas: float
    input_lambdas: float
    smear: float
    """Smear gate, smear_lambda and backout_lambda; never scaled."""
    matrix: float


@dataclass(frozen=True)
class Hyperparameters:
    """Everything that follows from a run's depth and overrides."""

    model: ModelConfig
    parameters: ParameterCounts
    flops_per_token: int
    """Forward and backward, one trained token."""
    target_tokens: int
    """Horizon that the data ratio asks for; sets batch and decay even if iterations are given."""
    reference_tokens: float
    """The same horizon at depth 12."""
    predicted_batch_tokens: float | None
    """Batch before rounding to a power of two; None where it was given."""
    total_batch_tokens: int
    """Tokens in one optimizer step, over all ranks and micro-batches."""
    num_iterations: int
    batch_lr_scale: float
    """Factor on every rate but `smear`, for the batch."""
    width_lr_scale: float
    """Factor on the three embedding rates, for the width."""
    weight_decay: float
    """Muon's, at the first step."""
    learning_rates: LearningRates

    @property
    def total_tokens(self) -> int:
        """Tokens to train on."""
        return self.num_iterations * self.total_batch_tokens

    @property
    def total_flops(self) -> int:
        """FLOPs of the run without evaluations."""
        return self.total_tokens * self.flops_per_token


def build_hyperparameters(config: DialConfig, vocab_size: int) -> Hyperparameters:
    """Derive a run's hyperparameters from its depth.

    Args:
        vocab_size: number of token ids, special tokens included.

    Raises:
        UsageError: a size is impossible, or the horizon is shorter than one batch.
    """
    model = build_model_config(config, vocab_size)
    counts = count_parameters(model)
    flops = flops_per_token(model)
    target_tokens = _target_tokens(config, counts)
    reference_tokens = _reference_tokens(config, vocab_size)
    predicted = None
    batch = config.total_batch_size
    if batch is None:
        predicted = REFERENCE_BATCH_TOKENS * (target_tokens / reference_tokens) ** BATCH_EXPONENT
        batch = 2 ** max(0, round(math.log2(predicted)))
    batch_scale = math.sqrt(batch / REFERENCE_BATCH_TOKENS)
    # Tuned. muP (https://arxiv.org/abs/2203.03466) has 1 / width, for the unembedding alone.
    width_scale = (model.model_dim / REFERENCE_MODEL_DIM) ** -0.5
    return Hyperparameters(
        model=model,
        parameters=counts,
        flops_per_token=flops,
        target_tokens=target_tokens,
        reference_tokens=reference_tokens,
        predicted_batch_tokens=predicted,
        total_batch_tokens=batch,
        num_iterations=_num_iterations(config, target_tokens, batch, flops),
        batch_lr_scale=batch_scale,
        width_lr_scale=width_scale,
        weight_decay=config.weight_decay * batch_scale * (reference_tokens / target_tokens),
        learning_rates=_learning_rates(config, batch_scale, width_scale),
    )


def build_model_config(config: DialConfig, vocab_size: int) -> ModelConfig:
    """Derive the model's shape from the depth.

    Raises:
        UsageError: the sizes contradict each other.
    """
    num_heads = math.ceil(config.depth * config.aspect_ratio / config.head_dim)
    whole = config.preset == "nanochat"
    if not whole and (config.window_pattern not in ("SSSL", "L") or config.qk_gain not in (1.2, 1)):
        raise UsageError(
            f"--preset {config.preset} means full attention and a gain of 1: leave "
            "--window-pattern and --qk-gain out, or the preset"
        )
    try:
        return ModelConfig(
            sequence_length=config.max_seq_len,
            vocab_size=vocab_size,
            num_layers=config.depth,
            num_heads=num_heads,
            num_kv_heads=num_heads if config.num_kv_heads is None else config.num_kv_heads,
            model_dim=num_heads * config.head_dim,
            window_pattern=config.window_pattern if whole else "L",
            value_embeddings=config.value_embeddings and whole,
            smear=config.smear and whole,
            backout=config.backout and whole,
            residual_lambdas=config.residual_lambdas and whole,
            qk_gain=config.qk_gain if whole else 1.0,
        )
    except ValueError as error:
        raise UsageError(
            f"no model of depth {config.depth}, aspect ratio {config.aspect_ratio} and head "
            f"dimension {config.head_dim}: {error}"
        ) from error


def grad_accum_steps(
    total_batch_tokens: int, device_batch_size: int, sequence_length: int, world_size: int
) -> int:
    """Return how many micro-batches of `device_batch_size` rows each rank adds up per step.

    Raises:
        UsageError: the batch is not a whole number of micro-batches; names what would work.
    """
    assert min(total_batch_tokens, device_batch_size, sequence_length, world_size) >= 1
    row_tokens = sequence_length * world_size
    micro_tokens = device_batch_size * row_tokens
    steps, rest = divmod(total_batch_tokens, micro_tokens)
    if rest == 0:
        return steps
    nearest = max(1, round(total_batch_tokens / micro_tokens)) * micro_tokens
    remedy = f"use --total-batch-size {nearest}"
    if total_batch_tokens % row_tokens == 0:
        rows = total_batch_tokens // row_tokens
        fitting = next(n for n in range(min(device_batch_size, rows), 0, -1) if rows % n == 0)
        remedy += f" or --device-batch-size {fitting}"
    raise UsageError(
        f"a batch of {total_batch_tokens} tokens is not a multiple of one micro-batch of "
        f"{device_batch_size} rows x {sequence_length} tokens x {world_size} rank(s) = "
        f"{micro_tokens} tokens: {remedy}"
    )


def _target_tokens(config: DialConfig, counts: ParameterCounts) -> int:
    horizon = config.target_param_data_ratio * counts.scaling
    if not 1 <= horizon < 2**63:
        raise UsageError(
            f"--target-param-data-ratio {config.target_param_data_ratio:g} asks for {horizon:g} "
            "training tokens: 12 is the default, about 10.5 compute-optimal"
        )
    return int(horizon)


def _reference_tokens(config: DialConfig, vocab_size: int) -> float:
    """Return the depth-12 horizon, with every query head its own key/value head."""
    reference = DialConfig(
        depth=REFERENCE_DEPTH, aspect_ratio=config.aspect_ratio, head_dim=config.head_dim
    )
    model = build_model_config(reference, vocab_size)
    return config.target_param_data_ratio * count_parameters(model).scaling


def _num_iterations(config: DialConfig, target_tokens: int, batch: int, flops: int) -> int:
    if config.num_iterations is not None:
        return config.num_iterations
    if config.target_flops is not None:
        iterations = round(config.target_flops / (flops * batch))
        horizon = f"--target-flops {config.target_flops:g}"
    else:
        iterations = target_tokens // batch
        horizon = f"the horizon of {target_tokens} tokens"
    if iterations < 1:
        raise UsageError(
            f"{horizon} is less than one step of {batch} tokens: give a smaller "
            "--total-batch-size, or --num-iterations"
        )
    return iterations


def _learning_rates(config: DialConfig, batch_scale: float, width_scale: float) -> LearningRates:
    embedding = config.embedding_lr * batch_scale * width_scale
    scalar = config.scalar_lr * batch_scale
    return LearningRates(
        unembedding=config.unembedding_lr * batch_scale * width_scale,
        embedding=embedding,
        value_embedding=embedding * 0.5,
        residual_lambdas=scalar * RESIDUAL_RATE_RATIO,
        input_lambdas=scalar,
        smear=SMEAR_RATE,
        matrix=config.matrix_lr * batch_scale,
    )
