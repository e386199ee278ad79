"""One decoding step for a batch of rows: compiled for a single row, captured on CUDA.

The step takes each row's last token from a tensor, runs it against the cache, draws the next
one and leaves it in the same tensor; lengths grow there too. The host says how many rows there
are and how far the longest reaches, and never waits for a value. What it says are shapes, so on
CUDA each pair, rounded up to a power of two, has a graph of its own that is captured once and
replayed; rows beyond those in use compute on what lies there, and nobody looks.

On CPUs a batch is bound by its matrix products and runs as it is. A single row is bound by the
hundreds of small operations of a step: compiled as a whole it takes about half the time
(docs/LOG.md), once the compiler is through, which takes seconds; so it is asked for, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from archerchat.inference.draws import Drawing, DrawPlan, DrawRules
from archerchat.inference.kv_cache import KVCache, Prefix, RingLayer, RingPart, ring_mask
from archerchat.model.compiling import compiled
from archerchat.model.transformer import Before, Transformer, norm

Forward = Callable[..., tuple[Tensor, Tensor, list[Tensor], list[Tensor]]]

Part = tuple[list[Tensor], list[Tensor]]
"""Each layer's keys and values of some rows, from `KVCache.views`."""
Reach = tuple[int, int]
"""How many rows, and more than any of them keeps."""

PART_ROWS = 16
"""Rows that are read as far as the longest of them reaches, on CPUs."""
SPAN = 32
"""Keys are read in multiples of so many, on CPUs."""
COMPILED_SPAN = 1024
"""By a compiled step in this number times a power of four: few shapes, as each takes seconds."""
LEAST_CAPTURED_SPAN = 256


def forward_token(
    model: Transformer,
    tokens: Tensor,
    lengths: Tensor,
    previous: Tensor,
    parts: Sequence[Part],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Run one token (B,) of each row after its past; changes nothing.

    Args:
        lengths: (B,), tokens before it.
        previous: (B, C), the normalised embedding of the one before it.
        parts: the rows' rings, in one part or several.

    Returns:
        Capped float32 logits (B, vocab_size), and what the cache should add: the normalised
        embedding (B, C), each layer's key and value (B, K, D).
    """
    found: list[list[RingPart]] = [[] for _ in model.config.windows]
    first = 0
    for keys, values in parts:
        rows = lengths[first : first + keys[0].size(0)]
        first += keys[0].size(0)
        spans = {k.size(2) for k in keys}
        masks = {span: ring_mask(rows, span, model.compute_dtype) for span in spans}
        for i, (k, v) in enumerate(zip(keys, values, strict=True)):
            found[i].append(RingPart(k, v, masks[k.size(2)]))
    layers = [RingLayer(of_layer) for of_layer in found]
    hidden = model.hidden(tokens[:, None], before=Before(lengths[:, None], previous, layers))
    embedded = norm(model.token_embedding(tokens).to(model.compute_dtype))
    new_keys = [layer.new_keys for layer in layers if layer.new_keys is not None]
    new_values = [layer.new_values for layer in layers if layer.new_values is not None]
    return model.logits(hidden[:, 0]), embedded, new_keys, new_values


class Decoder:
    """Rows in decoding: their cache, last tokens and rules, and the step that moves them on.

    Args:
        model: for inference; its weights are read where they are.
        rows: how many there can be.
        max_length: tokens of a row.
        compile: compile the step of a single row, on CPUs.
    """

    def __init__(self, model: Transformer, rows: int, max_length: int, compile: bool) -> None:
        device = model.device
        self.model, self.max_rows, self.max_length = model, rows, max_length
        self.cache = KVCache(model.config, rows, max_length, model.compute_dtype, device)
        self.drawing = Drawing(rows, device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._rows = torch.arange(rows, device=device)
        on_cpu = device.type == "cpu"
        self._single: Forward | None = compiled(forward_token) if compile and on_cpu else None
        self._captures = device.type == "cuda"
        self._pool: Any = None
        self._graphs: dict[tuple[int, int, DrawPlan], torch.cuda.CUDAGraph] = {}

    @torch.no_grad()
    def step(self, lengths: Sequence[int], plan: DrawPlan) -> None:
        """Draw the next token of the first rows into `tokens`.

        Args:
            lengths: tokens that each of these rows keeps; at least one row.
            plan: covers their rules.
        """
        rows, longest = len(lengths), max(lengths)
        if self._captures:
            count = min(1 << (rows - 1).bit_length(), self.max_rows)
            span = max(1 << longest.bit_length(), LEAST_CAPTURED_SPAN)
            self._replay(count, min(span, max(self.cache.sizes)), plan)
        elif rows == 1 and self._single is not None:
            span = COMPILED_SPAN
            while span <= longest:
                span *= 4
            self._run(self._single, [(1, span)], plan)
        else:
            self._run(forward_token, list(_reaches(lengths)), plan)

    def _run(self, forward: Forward, reaches: Sequence[Reach], plan: DrawPlan) -> None:
        parts, rows = [], 0
        for count, span in reaches:
            parts.append(self.cache.views(rows, rows + count, span))
            rows += count
        cache, tokens = self.cache, self.tokens[:rows]
        lengths, previous = cache.lengths[:rows], cache.previous[:rows]
        logits, embedded, keys, values = forward(self.model, tokens, lengths, previous, parts)
        tokens.copy_(self.drawing.draw(logits, lengths + 1, plan))
        cache.append(embedded, keys, values, self._rows[:rows])

    def _replay(self, rows: int, span: int, plan: DrawPlan) -> None:
        graph = self._graphs.get((rows, span, plan))
        if graph is None:
            graph = self._graphs[rows, span, plan] = self._capture(rows, span, plan)
        graph.replay()

    def _capture(self, rows: int, span: int, plan: DrawPlan) -> torch.cuda.CUDAGraph:
        """Record a step, leaving the rows as they are.

        The warm-up that a capture needs (libraries allocate on first use) moves the rows' tokens
        and lengths on and writes to the ring; all of that is put back.
        """
        kept = [self.tokens[:rows], *self.cache.state(rows)]
        saved = [tensor.clone() for tensor in kept]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run(forward_token, [(rows, span)], plan)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, before in zip(kept, saved, strict=True):
            tensor.copy_(before)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:  # one for all: graphs never run at the same time
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            self._run(forward_token, [(rows, span)], plan)
        return graph

    @torch.no_grad()
    def begin(self, row: int, prompt: Prefix, rules: DrawRules) -> None:
        """Give a row a prompt that has run and its rules; `draw_first` gives it its token."""
        self.cache.fill([row], prompt)
        self.drawing.assign(row, rules)

    @torch.no_grad()
    def draw_first(self, first: int, logits: Tensor, plan: DrawPlan) -> None:
        """Draw the tokens that follow the prompts of rows `first` on, from logits (n, vocab)."""
        rows = slice(first, first + logits.size(0))
        self.tokens[rows] = self.drawing.draw(logits, self.cache.lengths[rows], plan, first)

    @torch.no_grad()
    def force(self, row: int, token: int) -> None:
        """Put a token in the place of the one drawn last."""
        self.tokens[row] = token

    @torch.no_grad()
    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row that keeps `length` tokens over another."""
        self.cache.move(source, target, length)
        self.drawing.move(source, target)
        self.tokens[target] = self.tokens[source]


def _reaches(lengths: Sequence[int]) -> Iterator[Reach]:
    """Cut rows into parts and say how far to read each; equal neighbours are one part."""
    spans = [
        (max(lengths[i : i + PART_ROWS]) // SPAN + 1) * SPAN
        for i in range(0, len(lengths), PART_ROWS)
    ]
    rows = len(lengths)
    for span, group in groupby(enumerate(spans), key=lambda pair: pair[1]):
        places = [place for place, _ in group]
        yield min(PART_ROWS * len(places), rows - PART_ROWS * places[0]), span
