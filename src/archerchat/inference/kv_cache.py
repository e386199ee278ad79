"""The keys and values that running rows keep, each row of its own length and age.

A cache has a fixed number of rows. Each layer keeps as many positions of a row as its window
reaches back, in a ring: position p is in slot p mod S, so that a windowed layer takes the memory of
its window however long the row gets. A row also keeps its last token's normalised embedding, which
the smear of the next one adds, and its length; lengths are a tensor, so that a decoding step needs
nothing from the host and can be captured in a CUDA graph.

A `Prefix` holds the same for a prompt that is in no row yet: in order of position, shared by the
samples and by the prompts that begin with it. `RingLayer` and `PromptLayer` are what a layer's
attention sees of the past (`attention.Past`), in a decoding step and while prompts run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from archerchat.model.attention import Backend, attend
from archerchat.model.config import ModelConfig


@dataclass(frozen=True)
class Prefix:
    """What tokens to come need of the tokens so far."""

    length: int
    """Tokens so far."""
    layers: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values (K, n, D): the last n = min(window, length) positions in order."""
    previous: Tensor
    """(C,), the last token's normalised embedding."""
    logits: Tensor
    """(vocab_size,), the capped float32 logits that follow."""

    def clone(self) -> Prefix:
        """Return a copy that does not hold on to the batch that the prompt ran in."""
        layers = tuple((keys.clone(), values.clone()) for keys, values in self.layers)
        return Prefix(self.length, layers, self.previous.clone(), self.logits.clone())


class PromptLayer:
    """One layer while prompts run, after the keys and values of a shared prefix or after none."""

    def __init__(self, window: int, backend: Backend, past: tuple[Tensor, Tensor] | None) -> None:
        self.window, self.backend, self.past = window, backend, past
        self.new: tuple[Tensor, ...] = ()
        """Keys and values (B, T, K, D) of the new tokens, once they have attended."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from (B, T, H, D) to the prefix and to the new tokens up to each."""
        self.new = k, v
        if self.past is not None:
            k, v = (
                torch.cat([kept.transpose(0, 1).expand(k.size(0), -1, -1, -1), new], dim=1)
                for kept, new in zip(self.past, (k, v), strict=True)
            )
        return attend(q, k, v, self.window, self.backend)

    def kept(self, row: int, count: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values (K, n, D) in the window after a row's `count` new tokens."""
        k, v = (new[row, :count].transpose(0, 1) for new in self.new)
        if self.past is not None:
            k, v = torch.cat([self.past[0], k], dim=1), torch.cat([self.past[1], v], dim=1)
        return k[:, -self.window :], v[:, -self.window :]


def ring_mask(lengths: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    """Return (B, 1, 1, slots): 0 for what rows of lengths (B,) have written, -inf elsewhere."""
    unwritten = torch.arange(slots, device=lengths.device)[None, :] >= lengths[:, None]
    mask = torch.zeros(unwritten.shape, dtype=dtype, device=lengths.device)
    return mask.masked_fill(unwritten, -math.inf)[:, None, None, :]


class RingLayer:
    """One layer's past in a decoding step: one new token for each of B rows.

    Args:
        parts: (keys, values, mask) of neighbouring rows, which have a token each at least and
            together are the B rows: keys and values (b, K, S, D) of the slots that they have
            written, or of more, and their `ring_mask`.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        self.parts = parts
        self.new: tuple[Tensor, ...] = ()
        """The token's key and value (B, K, D), once it has attended."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from (B, 1, H, D) to the ring and to the token itself.

        `KVCache.append` writes it into the ring: compiled code would copy the ring for that, and
        a window of w still needs the token whose slot it takes.
        """
        batch, _, heads, dim = q.shape
        kv_heads = k.size(2)
        self.new = k[:, 0], v[:, 0]
        q = q.view(batch, kv_heads, heads // kv_heads, dim)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, 1, D)
        if len(self.parts) == 1:
            past, total = attend_ring(q, *self.parts[0])
        else:
            queries = torch.split(q, [keys.size(0) for keys, _, _ in self.parts])
            pairs = zip(queries, self.parts, strict=True)
            found = [attend_ring(rows, *part) for rows, part in pairs]
            past, total = map(torch.cat, zip(*found, strict=True))
        own = (q * k).sum(dim=-1).float() * (1 / math.sqrt(dim))  # (B, K, H/K)
        # The share of exp(own) in exp(total) + exp(own).
        share = torch.sigmoid(own - total)[..., None]
        out = torch.lerp(past.float(), v.float().expand_as(past), share).to(q.dtype)
        return out.reshape(batch, 1, heads, dim)


def attend_ring(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attend from one query per head to the filled cache slots.

    Args:
        q: (B, K, H/K, D); keys, values: (B, K, S, D); mask: (B, 1, 1, S).

    Returns:
        (B, K, H/K, D), and the log of the sum of exponentials (B, K, H/K) in float32.
    """
    if q.device.type == "cpu":  # this kernel reads 16-bit keys several times faster (docs/LOG.md)
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
        heads, dim = config.num_kv_heads, config.head_dim
        shapes = {size: (2, self.sizes.count(size), rows, heads, size, dim) for size in self.sizes}
        make = partial(torch.zeros, dtype=dtype, device=device)
        self._rings = {size: make(shape) for size, shape in shapes.items()}
        # Views of each layer's keys and values (rows, K, S, D). A ring has its layers in order.
        self._layers = [
            self._rings[size][:, self.sizes[:i].count(size)].unbind()
            for i, size in enumerate(self.sizes)
        ]
        self.previous = make((rows, config.model_dim))
        # A captured step also runs rows that nothing was put in. With a length of 0 they would
        # attend to nothing at all and leave NaN, which no mask hides.
        self.lengths = torch.ones(rows, dtype=torch.int64, device=device)

    def state(self, rows: int) -> list[Tensor]:
        """Return views of everything that a step of the first `rows` rows changes."""
        rings = [ring[:, :, :rows] for ring in self._rings.values()]
        return [*rings, self.previous[:rows], self.lengths[:rows]]

    def views(self, first: int, stop: int, span: int) -> list[tuple[Tensor, Tensor]]:
        """Return each layer's keys and values (stop - first, K, min(span, S), D), not copied."""
        return [(k[first:stop, :, :span], v[first:stop, :, :span]) for k, v in self._layers]

    def append(self, embedded: Tensor, new: Sequence[tuple[Tensor, ...]], rows: Tensor) -> None:
        """Add one token to each of the first B rows: its normalised embedding (B, C), and per
        layer its keys and values (B, K, D). `rows` is 0 .. B-1 on the device."""
        count = embedded.size(0)
        lengths = self.lengths[:count]
        for size, ring in self._rings.items():
            pairs = [pair for pair, own in zip(new, self.sizes, strict=True) if own == size]
            keys, values = (torch.stack(kind, dim=1) for kind in zip(*pairs, strict=True))
            # (B, 2, layers, K, D)
            ring[:, :, rows, :, lengths % size] = torch.stack([keys, values], dim=1)
        self.previous[:count] = embedded
        lengths += 1

    def fill(self, row: int, prefix: Prefix) -> None:
        """Start a row with a prefix, whatever it held."""
        for ring, kept in zip(chain(*self._layers), chain(*prefix.layers), strict=True):
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
