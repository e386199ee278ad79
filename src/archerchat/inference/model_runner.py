"""Run a model for prompts, and for the rows of a batch in decoding steps, which CUDA replays.

    prefix = Prefill(model, [shared_ids]).prefix(0)
    following = Prefill(model, continuations, prefix).last_logits

A step takes each row's last token from a tensor, runs it against the cache, samples the next token
and leaves it in the same tensor. Lengths grow on the device too. The host only says how many rows
there are and how far the longest reaches, and never waits for a value. These two numbers are
shapes, so on CUDA each pair, rounded up to powers of two, has a graph that is captured once and
replayed. Rows beyond those in use compute on stale values that nobody reads.

Hundreds of small operations bound a step on CUDA, and a single row's step on CPUs; compiled, it
takes a fraction of the time (docs/LOG.md). On CUDA each kind of layer is compiled once for all
sizes, on CPUs the whole step for each size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from archerchat.inference.kv_cache import KVCache, Prefix, PromptLayer, RingLayer, ring_mask
from archerchat.inference.loading import build_inference_model, can_pack
from archerchat.inference.sampler import Sampler, SamplingPlan
from archerchat.inference.sequence import Request, TokenLogprobs
from archerchat.model.compiling import compiled
from archerchat.model.transformer import Before, Regions, Transformer, norm

Forward = Callable[..., tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]]
RowSpan = tuple[int, int, int]
"""The first of some rows, the one after their last, and how many cache slots to read for them: more
than any of them keeps."""
Fetch = Callable[[], list[tuple[Any, ...]]]
"""Waits for sampled tokens; returns each row's, with its `Sampler.records` if the plan has them."""

PREFILL_TOKENS = 4096
"""Most tokens in a batch of several prompts, padding included: enough to fill a CPU's cores, few
enough that activations stay small."""
SCORED_TOKENS = 256
"""Positions whose logits exist at a time where every token of a prompt is scored."""
MIN_FILLED = 0.75
"""A prompt shorter than this share of the longest in a batch starts a new batch."""
PART_ROWS = 16
"""Rows that are read as far as the longest of them reaches, on CPUs."""
SPAN = 32
"""On CPUs the number of slots to read is a multiple of this."""
COMPILED_SPAN = 1024
"""A compiled step reads this number of slots times a power of four: each shape takes seconds to
compile, so there are few."""
MIN_CAPTURED_SPAN = 256


class Prefill:
    """A batch of prompts that run at once, after a prefix that they share or after nothing.

    Rows of unequal length are padded on the right, where causal attention hides the padding from
    every real token.

    Args:
        rows: each of at least one token; they do not repeat the shared prefix.

    Attributes:
        hidden: (B, T, C), padded on the right.
    """

    @torch.no_grad()
    def __init__(
        self, model: Transformer, rows: Sequence[Sequence[int]], shared: Prefix | None = None
    ) -> None:
        self.model, self.lengths = model, [len(row) for row in rows]
        assert min(self.lengths, default=0) > 0, "each row needs a token"
        width = max(self.lengths)
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
        self.hidden = model.hidden(token_ids, before=Before(positions, previous, layers))
        self._start, self._embedded, self._layers = start, embedded, layers

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
        layers = tuple(layer.kept(row, count) for layer in self._layers)
        embedded, logits = self._embedded[row, count - 1], self.last_logits[row]
        return Prefix(self._start + count, layers, embedded, logits)


@torch.no_grad()
def score_prompts(
    model: Transformer, rows: Sequence[Sequence[int]], top: int
) -> list[list[TokenLogprobs | None]]:
    """Return what the model gave each token of each row but the first, and the `top` most likely
    ones there."""
    found = []
    for row, hidden in zip(rows, Prefill(model, rows).hidden, strict=True):
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


def forward_token(
    model: Transformer,
    tokens: Tensor,
    lengths: Tensor,
    previous: Tensor,
    parts: Sequence[list[tuple[Tensor, Tensor]]],
    regions: Regions | None = None,
) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
    """Run one token (B,) of each row after its past; changes nothing.

    Args:
        lengths: (B,), tokens before it.
        previous: (B, C), the normalised embedding of the one before it.
        parts: the rows' `KVCache.views`, in one part or several.

    Returns:
        Capped float32 logits (B, vocab_size), and what `KVCache.append` takes.
    """
    masked = []
    rows = torch.split(lengths, [part[0][0].size(0) for part in parts])
    for part, ages in zip(parts, rows, strict=True):
        spans = {keys.size(2) for keys, _ in part}
        masks = {span: ring_mask(ages, span, model.compute_dtype) for span in spans}
        masked.append([(keys, values, masks[keys.size(2)]) for keys, values in part])
    layers = [RingLayer(of_layer) for of_layer in zip(*masked, strict=True)]
    before = Before(lengths[:, None], previous[:, None], layers)
    hidden = model.hidden(tokens[:, None], regions, before)
    embedded = norm(model.token_embedding(tokens).to(model.compute_dtype))
    return model.logits(hidden[:, 0]), embedded, [layer.new for layer in layers]


class ModelRunner:
    """Rows in decoding: their cache, the `tokens` sampled last, and their sampling parameters.

    `rows` is the most at a time; the other arguments, and `model`, are as in `Engine`.
    """

    def __init__(self, model: Transformer, rows: int, max_length: int, compile: bool) -> None:
        device = model.device
        self.model, self.max_rows = build_inference_model(model), rows
        self.cache = KVCache(model.config, rows, max_length, model.compute_dtype, device)
        self.sampler = Sampler(rows, model.config.vocab_size, device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._rows = torch.arange(rows, device=device)
        # Packed matrices are beyond the compiler.
        whole = compile and device.type == "cpu" and not can_pack(device, model.compute_dtype)
        self._single: Forward | None = compiled(forward_token) if whole else None
        self._captures = device.type == "cuda"
        regions = Regions.compiled(dynamic=True) if compile and self._captures else None
        self._forward: Forward = partial(forward_token, regions=regions)
        # One memory pool for all graphs, which never run at the same time.
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None
        self._graphs: dict[tuple[int, int, SamplingPlan], torch.cuda.CUDAGraph] = {}

    def start(self, row: int, prompt: Prefix, request: Request, seed: int) -> None:
        """Give a row a prompt that has run; `sample_first` samples its first token."""
        self.cache.fill(row, prompt)
        self.sampler.assign(row, request.params, seed, request.prompt)

    def sample_first(self, first: int, logits: Tensor, plan: SamplingPlan) -> None:
        """Sample what follows the prompts of rows `first` on, from logits (n, vocab_size)."""
        rows = slice(first, first + logits.size(0))
        self.tokens[rows] = self.sampler.sample(logits, self.cache.lengths[rows], plan, first)

    def step(self, lengths: Sequence[int], plan: SamplingPlan) -> None:
        """Sample the next token of the first rows, which keep `lengths` tokens, into `tokens`."""
        rows, longest = len(lengths), max(lengths)
        if self._captures:
            count = min(1 << (rows - 1).bit_length(), self.max_rows)
            span = max(1 << longest.bit_length(), MIN_CAPTURED_SPAN)
            key = count, min(span, max(self.cache.sizes)), plan
            if key not in self._graphs:
                self._graphs[key] = self._capture(*key)
            self._graphs[key].replay()
        elif rows == 1 and self._single is not None:
            span = COMPILED_SPAN
            while span <= longest:
                span *= 4
            self._run(self._single, [(0, 1, span)], plan)
        else:
            self._run(self._forward, list(row_spans(lengths)), plan)

    def _run(self, forward: Forward, spans: Sequence[RowSpan], plan: SamplingPlan) -> None:
        rows, cache = spans[-1][1], self.cache
        tokens, parts = self.tokens[:rows], [cache.views(*span) for span in spans]
        lengths, previous = cache.lengths[:rows], cache.previous[:rows]
        logits, embedded, new = forward(self.model, tokens, lengths, previous, parts)
        tokens.copy_(self.sampler.sample(logits, lengths + 1, plan, said=tokens))
        cache.append(embedded, new, self._rows[:rows])

    def _capture(self, rows: int, span: int, plan: SamplingPlan) -> torch.cuda.CUDAGraph:
        """Record a step. It needs a warm-up, because libraries allocate on first use; what that
        changes of the rows is put back."""
        kept = [self.tokens[:rows], *self.cache.state(rows), *self.sampler.state(rows)]
        saved = [tensor.clone() for tensor in kept]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run(self._forward, [(0, rows, span)], plan)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, before in zip(kept, saved, strict=True):
            tensor.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._run(self._forward, [(0, rows, span)], plan)
        return graph

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row that keeps `length` tokens over another."""
        self.cache.move(source, target, length)
        self.sampler.move(source, target)
        self.tokens[target] = self.tokens[source]

    def fetch(self, first: int, count: int, plan: SamplingPlan) -> Fetch:
        """Start copying what was sampled last for some rows to the host."""
        rows = slice(first, first + count)
        asked = [self.tokens[rows], *([self.sampler.records[rows]] if plan.logprobs else [])]
        # On CUDA such copies go to pinned memory and do not hold up the host.
        copies = [tensor.to("cpu", non_blocking=True, copy=True) for tensor in asked]
        arrived = torch.cuda.Event() if self.tokens.is_cuda else None  # type: ignore[no-untyped-call]
        if arrived is not None:
            arrived.record()

        def read() -> list[tuple[Any, ...]]:
            if arrived is not None:
                arrived.synchronize()
            return list(zip(*(tensor.tolist() for tensor in copies), strict=True))

        return read


def row_spans(lengths: Sequence[int]) -> Iterator[RowSpan]:
    """Yield parts of neighbouring rows that are read equally far."""

    def span_of(first: int) -> int:
        return (max(lengths[first : first + PART_ROWS]) // SPAN + 1) * SPAN

    for span, group in groupby(range(0, len(lengths), PART_ROWS), key=span_of):
        firsts = list(group)
        yield firsts[0], min(firsts[-1] + PART_ROWS, len(lengths)), span
