"""Run many prompts through a model at once, after a prefix that they share or after nothing.

    prefix = prefill(model, [shared_ids]).prefix(0)
    following = prefill(model, continuations, prefix).last_logits
    scores = score_prompts(model, rows, top=5)

Rows of unequal length are padded on the right, where causal attention hides the padding from
every real token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from archerchat.inference.kv_cache import Prefix
from archerchat.inference.sequence import TokenLogprobs
from archerchat.model.attention import Backend, attend
from archerchat.model.transformer import Before, Transformer, norm

PREFILL_TOKENS = 4096
"""Most tokens in a batch of several prompts, padding included: enough to fill a CPU's cores, few
enough that activations stay small."""
SCORED_TOKENS = 256
"""Positions whose logits exist at a time where every token of a prompt is scored."""
MIN_FILLED = 0.75
"""A prompt shorter than this share of the longest in a batch starts a new batch."""


class PromptLayer:
    """One layer in a prefill, after the keys and values of a shared prefix where there is one."""

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


@dataclass(frozen=True, eq=False)
class Prefilled:
    """A batch of prompts that have run after `start` tokens that they share."""

    model: Transformer
    lengths: Sequence[int]
    hidden: Tensor
    """(B, T, C), padded on the right."""
    embedded: Tensor
    """(B, T, C), the normalised embeddings."""
    layers: Sequence[PromptLayer]
    start: int

    @cached_property
    @torch.no_grad()
    def last_logits(self) -> Tensor:
        """The capped float32 logits (B, vocab_size) that follow each row."""
        rows = torch.arange(len(self.lengths), device=self.hidden.device)
        last = torch.tensor(self.lengths).to(self.hidden.device, non_blocking=True) - 1
        return self.model.logits(self.hidden[rows, last])

    def prefix(self, row: int) -> Prefix:
        """Return what a continuation of a row needs, the shared prefix included."""
        count = self.lengths[row]
        layers = tuple(layer.kept(row, count) for layer in self.layers)
        embedded, logits = self.embedded[row, count - 1], self.last_logits[row]
        return Prefix(self.start + count, layers, embedded, logits)


@torch.no_grad()
def prefill(
    model: Transformer, rows: Sequence[Sequence[int]], shared: Prefix | None = None
) -> Prefilled:
    """Run one batch of rows, each of at least one token, which do not repeat the shared prefix."""
    lengths = [len(row) for row in rows]
    assert min(lengths, default=0) > 0, "each row needs a token"
    width = max(lengths)
    padded = [[*row, *[0] * (width - len(row))] for row in rows]
    token_ids = torch.tensor(padded).to(model.device, non_blocking=True)
    embedded = norm(model.token_embedding(token_ids).to(model.compute_dtype))
    start = shared.length if shared else 0
    first = shared.previous if shared else embedded.new_zeros(embedded.size(2))
    layers = [
        PromptLayer(window, model.backend, shared.layers[i] if shared else None)
        for i, window in enumerate(model.config.windows)
    ]
    previous = torch.cat([first.expand(len(rows), 1, -1), embedded[:, :-1]], dim=1)
    positions = torch.arange(start, start + width, device=model.device)
    hidden = model.hidden(token_ids, before=Before(positions, previous, layers))
    return Prefilled(model, lengths, hidden, embedded, layers, start)


@torch.no_grad()
def score_prompts(
    model: Transformer, rows: Sequence[Sequence[int]], top: int
) -> list[list[TokenLogprobs | None]]:
    """Return what the model gave each token of each row, and the `top` most likely ones there.

    The first token of a row has none: nothing comes before it.
    """
    found = []
    for row, hidden in zip(rows, prefill(model, rows).hidden, strict=True):
        scores: list[TokenLogprobs | None] = [None]
        targets = torch.tensor(row[1:], device=model.device)
        for start in range(0, len(targets), SCORED_TOKENS):
            part = targets[start : start + SCORED_TOKENS]
            logprobs = model.logits(hidden[start : start + len(part)]).log_softmax(dim=-1)
            own = logprobs.gather(1, part[:, None])[:, 0].tolist()
            values, ids = (best.tolist() for best in logprobs.topk(top, dim=-1))
            pairs = (zip(*both, strict=True) for both in zip(ids, values, strict=True))
            scores += map(TokenLogprobs, own, map(tuple, pairs))
        found.append(scores)
    return found


def iter_batches(lengths: Sequence[int], max_tokens: int = PREFILL_TOKENS) -> Iterator[list[int]]:
    """Cut rows of these lengths into batches of similar length; yield their indices.

    A batch of several rows has at most `max_tokens` tokens, padding included.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    first = 0
    while first < len(order):
        longest = lengths[order[first]]
        fitting = order[first : first + max(1, max_tokens // max(1, longest))]
        batch = [i for i in fitting if lengths[i] >= MIN_FILLED * longest]
        yield batch
        first += len(batch)
