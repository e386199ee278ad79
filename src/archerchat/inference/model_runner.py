"""Run a model for the rows of a batch: prompts, and decoding steps, which CUDA replays as graphs.

A step takes each row's last token from a tensor, runs it against the cache, samples the next token
and leaves it in the same tensor. Lengths grow on the device too. The host only says how many rows
there are and how far the longest reaches, and never waits for a value. These two numbers are
shapes, so on CUDA each pair, rounded up to powers of two, has a graph that is captured once and
replayed. Rows beyond those in use compute on stale values that nobody reads.

Hundreds of small operations bound a step on CUDA, and a single row's step on CPUs. Compiled, it
takes a fraction of the time (docs/LOG.md), after seconds of compiling. On CUDA each kind of layer
is compiled once for all sizes, on CPUs the whole step for each size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from archerchat.inference.kv_cache import KVCache, Prefix, RingLayer, RingPart, ring_mask
from archerchat.inference.loading import build_inference_model, can_pack
from archerchat.inference.sampler import Sampler, SamplingPlan
from archerchat.inference.sequence import Request, TokenLogprobs
from archerchat.model.compiling import compiled
from archerchat.model.transformer import Before, Regions, Transformer, norm

Part = list[tuple[Tensor, Tensor]]
"""Each layer's keys and values of some rows, from `KVCache.views`."""
NewToken = tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]
"""Capped float32 logits (B, vocab_size), and what the cache should add: the normalised embedding
(B, C), each layer's key and value (B, K, D)."""
Forward = Callable[..., NewToken]
Fetch = Callable[[], list[tuple[int, TokenLogprobs | None]]]
"""Waits for sampled tokens; returns each row's, with log probabilities if the plan has them."""
RowSpan = tuple[int, int]
"""A number of rows, and how many cache slots to read for them: more than any of them keeps."""

PART_ROWS = 16
"""Rows that are read as far as the longest of them reaches, on CPUs."""
SPAN = 32
"""On CPUs the number of slots to read is a multiple of this."""
COMPILED_SPAN = 1024
"""A compiled step reads this number of slots times a power of four: each shape takes seconds to
compile, so there are few."""
MIN_CAPTURED_SPAN = 256


def forward_token(
    model: Transformer,
    tokens: Tensor,
    lengths: Tensor,
    previous: Tensor,
    parts: Sequence[Part],
    regions: Regions | None = None,
) -> NewToken:
    """Run one token (B,) of each row after its past; changes nothing.

    Args:
        lengths: (B,), tokens before it.
        previous: (B, C), the normalised embedding of the one before it.
        parts: the rows' rings, in one part or several.
    """
    found: list[list[RingPart]] = [[] for _ in model.config.windows]
    rows = torch.split(lengths, [part[0][0].size(0) for part in parts])
    for part, ages in zip(parts, rows, strict=True):
        spans = {keys.size(2) for keys, _ in part}
        masks = {span: ring_mask(ages, span, model.compute_dtype) for span in spans}
        for of_layer, (keys, values) in zip(found, part, strict=True):
            of_layer.append((keys, values, masks[keys.size(2)]))
    layers = [RingLayer(of_layer) for of_layer in found]
    before = Before(lengths[:, None], previous[:, None], layers)
    hidden = model.hidden(tokens[:, None], regions, before)
    embedded = norm(model.token_embedding(tokens).to(model.compute_dtype))
    return model.logits(hidden[:, 0]), embedded, [layer.new for layer in layers]


class ModelRunner:
    """Rows in decoding: their cache, last tokens and sampling parameters.

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
            self._run(self._single, [(1, span)], plan)
        else:
            self._run(self._forward, list(row_spans(lengths)), plan)

    def _run(self, forward: Forward, spans: Sequence[RowSpan], plan: SamplingPlan) -> None:
        parts, rows = [], 0
        for count, span in spans:
            parts.append(self.cache.views(rows, rows + count, span))
            rows += count
        cache, tokens = self.cache, self.tokens[:rows]
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
                self._run(self._forward, [(rows, span)], plan)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, before in zip(kept, saved, strict=True):
            tensor.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._run(self._forward, [(rows, span)], plan)
        return graph

    def start(self, row: int, prompt: Prefix, request: Request, seed: int) -> None:
        """Give a row a prompt that has run; `sample_first` samples its first token."""
        self.cache.fill(row, prompt)
        self.sampler.assign(row, request.params, seed, request.prompt)

    def sample_first(self, first: int, logits: Tensor, plan: SamplingPlan) -> None:
        """Sample what follows the prompts of rows `first` on, from logits (n, vocab_size)."""
        rows = slice(first, first + logits.size(0))
        self.tokens[rows] = self.sampler.sample(logits, self.cache.lengths[rows], plan, first)

    def force(self, row: int, token: int) -> None:
        """Replace the token that was sampled last."""
        self.tokens[row] = token

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

        def read() -> list[tuple[int, TokenLogprobs | None]]:
            if arrived is not None:
                arrived.synchronize()
            tokens, *records = (tensor.tolist() for tensor in copies)
            logprobs = map(read_record, records[0]) if records else [None] * len(tokens)
            return list(zip(tokens, logprobs, strict=True))

        return read


def read_record(record: Sequence[float]) -> TokenLogprobs:
    """Read a row of `Sampler.records`."""
    count = len(record) // 2
    top = zip(map(int, record[1 + count :]), record[1 : 1 + count], strict=True)
    return TokenLogprobs(record[0], tuple(top))


def row_spans(lengths: Sequence[int]) -> Iterator[RowSpan]:
    """Yield how far to read the rows, in parts of neighbouring rows with the same answer."""

    def span_of(first: int) -> int:
        return (max(lengths[first : first + PART_ROWS]) // SPAN + 1) * SPAN

    for span, group in groupby(range(0, len(lengths), PART_ROWS), key=span_of):
        firsts = list(group)
        yield min(firsts[-1] + PART_ROWS, len(lengths)) - firsts[0], span
