"""Estimate what one rank needs to train a shape, without building it.

Three parts add up: what is kept for the whole run (weights, gradients, optimizer state), the
activations of each row of a micro-batch, and temporary workspace.

The activations follow what a compiled forward pass of `model/transformer.py` saves: counted
with saved-tensor hooks behind torch's min-cut partitioner, it is within a few per cent of the
formula here (a test counts again). Fused attention is assumed, so no scores; no recomputation;
the loss in chunks, so no logits. The total is an estimate: allocators round up, fragment and keep
freed memory, so `RESERVED_SHARE` of the device is not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from archerchat.model.config import ModelConfig
from archerchat.model.flops import count_parameters
from archerchat.model.loss import chunk_tokens
from archerchat.optim.optimizer import PART_ELEMENTS

CPU_TOKENS = 2**13
"""Tokens per micro-batch above which a CPU gets no faster."""
RESERVED_SHARE = 0.10
"""Share of the device's memory left for its context, fragmentation and a desktop."""
LOSS_CHUNK_TENSORS = 4
"""Number of tensors of a chunk's logits that exist at once, in the compute dtype."""
MUON_STACK_BYTES = 20
"""Temporary bytes per element of the largest Muon stack: both copies, the update, products."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes needed on one rank."""

    weights: int
    gradients: int
    optimizer_state: int
    weight_casts: int
    """Copies of float32 masters in the compute dtype, kept for the backward pass."""
    workspace: int
    """The larger of the loss's chunk and the optimizer's temporaries."""
    activations_per_row: int
    """Bytes that each row of a micro-batch saves for the backward pass."""

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the micro-batch."""
        kept = self.weights + self.gradients + self.optimizer_state
        return kept + self.weight_casts + self.workspace

    def total(self, device_batch_size: int) -> int:
        """Return the peak with this many rows per micro-batch."""
        return self.fixed + device_batch_size * self.activations_per_row


def estimate_memory(
    config: ModelConfig,
    compute_dtype: torch.dtype,
    device: torch.device,
    world_size: int = 1,
    memory_bytes: int | None = None,
    recomputes: bool = False,
    state_dtype: torch.dtype = torch.float32,
) -> MemoryEstimate:
    """Estimate the memory of one rank.

    Args:
        compute_dtype: dtype of activations; embeddings are stored in it when it is bfloat16.
        device: its kind and memory decide how many logits the loss forms at a time.
        world_size: number of ranks that share the optimizer's state (ZeRO-2, SPEC section 3).
        memory_bytes: memory of the device; by default the device is asked.
        recomputes: whether the backward pass computes each layer again.
        state_dtype: dtype of the optimizer's moments.
    """
    counts, vocab = count_parameters(config), config.padded_vocab_size
    cast_bytes = compute_dtype.itemsize
    tables = counts.embedding + counts.value_embeddings
    weights = tables * (2 if compute_dtype == torch.bfloat16 else 4) + (counts.total - tables) * 4
    # AdamW keeps two moments, Muon one momentum (its row variances are negligible).
    moments = 2 * (counts.total - counts.block_matrices) + counts.block_matrices
    # A layer that is computed again casts its weights again.
    layers = counts.block_matrices // (config.num_layers if recomputes else 1)
    # A chunk's logits, and the unembedding's gradient that grows chunk by chunk.
    logits = chunk_tokens(vocab, device, memory_bytes) * vocab
    loss = LOSS_CHUNK_TENSORS * cast_bytes * logits + 4 * vocab * config.model_dim
    row = config.sequence_length * _elements_per_token(config, recomputes)
    return MemoryEstimate(
        weights=weights,
        gradients=weights,
        optimizer_state=state_dtype.itemsize * moments // world_size,
        weight_casts=(counts.unembedding + layers) * cast_bytes if cast_bytes < 4 else 0,
        workspace=max(loss, _optimizer_workspace(config, world_size)),
        activations_per_row=row * cast_bytes,
    )


def _elements_per_token(config: ModelConfig, recomputes: bool) -> int:
    """Count the values that the layers save for one token's backward pass.

    Each layer: its input and both branches' inputs before and after normalisation (5 C), queries
    before and after theirs and the attention's output (3 C), both sides of relu squared (8 C),
    keys before and after theirs and values (3 K D), and a row of its value embedding (K D). Where
    layers are computed again, each keeps its input, and one of them the rest.
    """
    c, kv, count = config.model_dim, config.kv_dim, config.num_layers
    layer, embedded = 16 * c + 3 * kv, sum(map(config.has_value_embedding, range(count)))
    return (count * c + layer if recomputes else count * layer) + embedded * kv + 4 * c


def _optimizer_workspace(config: ModelConfig, world_size: int) -> int:
    """Return the bytes of Muon's temporaries for the largest stack of equal-shaped matrices."""
    square = 2 * config.model_dim * (config.model_dim + config.kv_dim)
    if config.kv_dim != config.model_dim:
        square //= 2
    matrix = 4 * config.model_dim**2
    largest = max(square, matrix) * config.num_layers // world_size
    if world_size == 1:
        largest = min(largest, max(PART_ELEMENTS, matrix))
    return MUON_STACK_BYTES * largest


def fit_micro_batch(
    config: ModelConfig,
    compute_dtype: torch.dtype,
    device: torch.device,
    world_size: int,
    memory_bytes: int,
    rows: int,
    *,
    recomputes: bool = False,
    state_dtype: torch.dtype = torch.float32,
) -> tuple[MemoryEstimate, int | None, bool]:
    """Find the largest micro-batch that fits; the arguments are those of `estimate_memory`.

    Returns:
        The estimate; the rows, None if not even one fits; and whether layers are computed again:
        if `recomputes` asks for it, or if not one row fits without.
    """
    # More rows make a GPU faster, a CPU only fuller.
    most = math.inf if device.type == "cuda" else CPU_TOKENS / config.sequence_length
    for again in (True,) if recomputes else (False, True):
        estimate = estimate_memory(
            config, compute_dtype, device, world_size, memory_bytes, again, state_dtype
        )
        if size := max_device_batch_size(estimate, memory_bytes, rows, most):
            break
    return estimate, size, again


def max_device_batch_size(
    estimate: MemoryEstimate, memory_bytes: int, rows: int, most: float = math.inf
) -> int | None:
    """Return the largest power of two of rows that fits, or None if not even one does.

    It divides `rows`, the rows of one rank per optimizer step, and is not above `most`.
    """
    usable = memory_bytes * (1 - RESERVED_SHARE)
    size = 1
    while rows % (2 * size) == 0 and 2 * size <= most and estimate.total(2 * size) <= usable:
        size *= 2
    return size if estimate.total(size) <= usable else None


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return what one generated token adds to the cache: keys and values of every layer."""
    return config.num_layers * 2 * config.kv_dim * dtype.itemsize


def kv_cache_bytes(config: ModelConfig, dtype: torch.dtype, tokens: int) -> int:
    """Return the bytes of one row's cache after `tokens`; each layer keeps only its window."""
    kept = sum(min(window, tokens) for window in config.windows)
    return 2 * config.kv_dim * dtype.itemsize * kept
