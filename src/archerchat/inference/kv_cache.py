"""The keys and values that running rows keep, each row of its own length and age.

A cache has a fixed number of rows. Each layer keeps of a row as many positions as its window
reaches back, in a ring: position p lies in slot p mod S, so that a windowed layer costs its window
however long the row gets. A row also keeps its last token's normalised embedding, which the smear
of the next one adds, and its length; lengths are a tensor, so that a decoding step needs nothing
from the host and can be captured in a CUDA graph.

A `Prefix` is the same for a prompt that is in no row yet: position-ordered, shared by the samples
and by the prompts that begin with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from archerchat.model.config import ModelConfig


@dataclass(frozen=True)
class Prefix:
    """What tokens to come need of the tokens so far."""

    length: int
    """Tokens so far."""
    keys: tuple[Tensor, ...]
    """A layer: (K, n, D), the last n = min(window, length) positions in order."""
    values: tuple[Tensor, ...]
    previous: Tensor
    """(C,), the last token's normalised embedding."""


class RingLayer:
    """One layer's past in a decoding step: one new token for each of the first B rows.

    Args:
        keys: (B, K, S, D), the slots of the ring that are written to, or more.
        values: likewise.
        lengths: (B,), tokens that each row keeps so far.
    """

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        self.keys, self.values, self.lengths = keys, values, lengths
        self.new_keys: Tensor | None = None
        self.new_values: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from (B, 1, H, D) to the ring and to the token itself.

        Writing it into the ring is `KVCache.append`'s: compiled code would copy the ring for
        that, and a window of w still needs the token whose slot it takes. The softmax is in
        float32.
        """
        batch, _, heads, dim = q.shape
        kv_heads = k.size(2)
        q = q.view(batch, kv_heads, heads // kv_heads, dim)
        new_k, new_v = k[:, 0], v[:, 0]  # (B, K, D)
        slots = torch.arange(self.keys.size(2), device=q.device)
        hidden = slots[None, :] >= self.lengths[:, None]  # nothing was written there yet
        past = (q @ self.keys.transpose(2, 3)).float()  # (B, K, H/K, S)
        past = past.masked_fill(hidden[:, None, None, :], -math.inf)
        own = (q * new_k[:, :, None]).sum(dim=-1, keepdim=True).float()
        scores = torch.cat([past, own], dim=-1) * (1 / math.sqrt(dim))
        weights = scores.softmax(dim=-1).to(q.dtype)
        out = weights[..., :-1] @ self.values + weights[..., -1:] * new_v[:, :, None]
        self.new_keys, self.new_values = new_k, new_v
        return out.reshape(batch, 1, heads, dim)


class KVCache:
    """Keys and values of up to `rows` rows of up to `max_length` tokens.

    Args:
        config: the model's shape.
        dtype: the model's compute dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.sizes = tuple(min(window, max_length) for window in config.windows)

        def allocate() -> tuple[Tensor, ...]:
            shape = (rows, config.num_kv_heads, -1, config.head_dim)
            return tuple(
                torch.zeros(*shape[:2], size, shape[3], dtype=dtype, device=device)
                for size in self.sizes
            )

        self.keys, self.values = allocate(), allocate()
        self.previous = torch.zeros(rows, config.model_dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values; `memory.kv_cache_bytes` for each row."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def views(self, rows: int, span: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return each layer's keys and values (rows, K, min(span, S), D), not copied."""
        keys = [ring[:rows, :, :span] for ring in self.keys]
        return keys, [ring[:rows, :, :span] for ring in self.values]

    def append(
        self, embedded: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], rows: Tensor
    ) -> None:
        """Add one token to each of the first B rows.

        Args:
            embedded: (B, C), its normalised embedding.
            keys: a layer: (B, K, D); values likewise.
            rows: 0 .. B-1 on the device.
        """
        count = embedded.size(0)
        lengths = self.lengths[:count]
        slots = {size: lengths % size for size in set(self.sizes)}
        for i, size in enumerate(self.sizes):
            self.keys[i][rows, :, slots[size]] = keys[i]
            self.values[i][rows, :, slots[size]] = values[i]
        self.previous[:count] = embedded
        lengths += 1

    def fill(self, rows: Sequence[int], prefix: Prefix) -> None:
        """Begin each of these rows with a prefix, whatever they held."""
        rings, parts = (*self.keys, *self.values), (*prefix.keys, *prefix.values)
        for ring, kept in zip(rings, parts, strict=True):
            count, size = kept.size(1), ring.size(2)
            assert count <= size, f"{count} positions for {size} slots"
            first = (prefix.length - count) % size  # slot of the oldest position that is kept
            head = min(count, size - first)
            for row in rows:
                ring[row, :, first : first + head] = kept[:, :head]
                ring[row, :, : count - head] = kept[:, head:]
        for row in rows:
            self.previous[row] = prefix.previous
            self.lengths[row] = prefix.length

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row of `length` tokens over another."""
        for ring in (*self.keys, *self.values):
            ring[target, :, :length] = ring[source, :, :length]
        self.previous[target] = self.previous[source]
        self.lengths[target] = self.lengths[source]
