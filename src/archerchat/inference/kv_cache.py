"""The keys and values that running rows keep, each row of its own length and age.

A cache has a fixed number of rows. Each layer keeps as many positions of a row as its window
reaches back, in a ring: position p is in slot p mod S, so that a windowed layer takes the memory of
its window however long the row gets. A row also keeps its last token's normalised embedding, which
the smear of the next one adds, and its length; lengths are a tensor, so that a decoding step needs
nothing from the host and can be captured in a CUDA graph.

A `Prefix` holds the same for a prompt that is in no row yet: in order of position, shared by the
samples and by the prompts that begin with it.
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
    """Per layer (K, n, D): the last n = min(window, length) positions in order."""
    values: tuple[Tensor, ...]
    previous: Tensor
    """(C,), the last token's normalised embedding."""


def ring_mask(lengths: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    """Return (B, 1, 1, slots): 0 for what rows of lengths (B,) have written, -inf elsewhere."""
    unwritten = torch.arange(slots, device=lengths.device)[None, :] >= lengths[:, None]
    mask = torch.zeros(unwritten.shape, dtype=dtype, device=lengths.device)
    return mask.masked_fill(unwritten, -math.inf)[:, None, None, :]


@dataclass(frozen=True)
class RingPart:
    """What a layer keeps of some neighbouring rows."""

    keys: Tensor
    """(b, K, S, D), the slots of the rings that these rows have written, or more."""
    values: Tensor
    mask: Tensor
    """From `ring_mask`; each row has one token at least."""


@dataclass(eq=False)
class RingLayer:
    """One layer's past in a decoding step: one new token for each of B rows."""

    parts: Sequence[RingPart]
    """Together the B rows, in order. Rows of similar length in a part of their own are read no
    further than they reach."""
    new_keys: Tensor | None = None
    new_values: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from (B, 1, H, D) to the ring and to the token itself.

        `KVCache.append` writes it into the ring: compiled code would copy the ring for that, and
        a window of w still needs the token whose slot it takes.
        """
        batch, _, heads, dim = q.shape
        kv_heads = k.size(2)
        self.new_keys, self.new_values = k[:, 0], v[:, 0]  # (B, K, D)
        q = q.view(batch, kv_heads, heads // kv_heads, dim)
        k, v = self.new_keys[:, :, None], self.new_values[:, :, None]
        past, total = self._attend_parts(q)
        own = (q * k).sum(dim=-1).float() * (1 / math.sqrt(dim))  # (B, K, H/K)
        # The share of exp(own) in exp(total) + exp(own).
        share = torch.sigmoid(own - total)[..., None]
        out = torch.lerp(past.float(), v.float().expand_as(past), share).to(q.dtype)
        return out.reshape(batch, 1, heads, dim)

    def _attend_parts(self, q: Tensor) -> tuple[Tensor, Tensor]:
        if len(self.parts) == 1:
            part = self.parts[0]
            return attend_ring(q, part.keys, part.values, part.mask)
        queries = torch.split(q, [part.keys.size(0) for part in self.parts])
        pairs = [
            attend_ring(queries[i], part.keys, part.values, part.mask)
            for i, part in enumerate(self.parts)
        ]
        return torch.cat([past for past, _ in pairs]), torch.cat([total for _, total in pairs])


def attend_ring(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attend from one query per head to the filled cache slots.

    CPUs use the fused kernel, which reads 16-bit keys several times faster than a product of one
    row (docs/LOG.md).

    Args:
        q: (B, K, H/K, D); keys, values: (B, K, S, D); mask: (B, 1, 1, S).

    Returns:
        (B, K, H/K, D), and the log of the sum of exponentials (B, K, H/K) in float32.
    """
    if q.device.type == "cpu":
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        past, total = fused(q, keys, values, 0.0, False, attn_mask=mask)
        return past, total
    scores = (q @ keys.transpose(2, 3)).float() * (1 / math.sqrt(q.size(3))) + mask.float()
    weights = scores.softmax(dim=-1).to(values.dtype)
    return weights @ values, scores.logsumexp(dim=-1)


class KVCache:
    """Keys and values of up to `rows` rows of up to `max_length` tokens."""

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.sizes = tuple(min(window, max_length) for window in config.windows)
        # Layers of one size share a tensor (2, layers, rows, K, S, D), so that one operation
        # writes a step's keys and values to all of them.
        self._layers = {
            size: [i for i, other in enumerate(self.sizes) if other == size]
            for size in sorted(set(self.sizes))
        }
        heads, dim = config.num_kv_heads, config.head_dim
        self._rings = {
            size: torch.zeros(2, len(layers), rows, heads, size, dim, dtype=dtype, device=device)
            for size, layers in self._layers.items()
        }
        self.previous = torch.zeros(rows, config.model_dim, dtype=dtype, device=device)
        # A captured step also runs rows that nothing was put in. With a length of 0 they would
        # attend to nothing at all and leave NaN, which no mask hides.
        self.lengths = torch.ones(rows, dtype=torch.int64, device=device)

    def state(self, rows: int) -> list[Tensor]:
        """Return views of everything that a step of the first `rows` rows changes."""
        rings = [ring[:, :, :rows] for ring in self._rings.values()]
        return [*rings, self.previous[:rows], self.lengths[:rows]]

    def views(self, first: int, stop: int, span: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return each layer's keys and values of rows `first` .. `stop` - 1, not copied.

        They are (rows, K, min(span, S), D).
        """
        keys, values = (
            [
                self._rings[size][kind, self._layers[size].index(i), first:stop, :, :span]
                for i, size in enumerate(self.sizes)
            ]
            for kind in range(2)
        )
        return keys, values

    def append(
        self, embedded: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], rows: Tensor
    ) -> None:
        """Add one token to each of the first B rows.

        Args:
            embedded: (B, C), its normalised embedding.
            keys, values: (B, K, D) per layer.
            rows: 0 .. B-1 on the device.
        """
        count = embedded.size(0)
        lengths = self.lengths[:count]
        for size, layers in self._layers.items():
            new = torch.stack(
                [torch.stack([kind[i] for i in layers], dim=1) for kind in (keys, values)], dim=1
            )  # (B, 2, layers, K, D)
            self._rings[size][:, :, rows, :, lengths % size] = new
        self.previous[:count] = embedded
        lengths += 1

    def fill(self, row: int, prefix: Prefix) -> None:
        """Start a row with a prefix, whatever it held."""
        keys, values = self.views(0, self.lengths.size(0), max(self.sizes))
        parts = (*prefix.keys, *prefix.values)
        for ring, kept in zip((*keys, *values), parts, strict=True):
            count, size = kept.size(1), ring.size(2)
            assert count <= size, f"{count} positions for {size} slots"
            first = (prefix.length - count) % size  # slot of the oldest position that is kept
            head = min(count, size - first)
            ring[row, :, first : first + head] = kept[:, :head]
            ring[row, :, : count - head] = kept[:, head:]
        self.previous[row] = prefix.previous
        self.lengths[row] = prefix.length

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row of `length` tokens over another."""
        for ring in self._rings.values():
            ring[:, :, target, :, :length] = ring[:, :, source, :, :length]
        self.previous[target] = self.previous[source]
        self.lengths[target] = self.lengths[source]
