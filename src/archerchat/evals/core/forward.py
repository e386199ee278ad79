"""Run a laid-out batch of trees through a model and score its targets.

The same formulas as `Transformer.hidden` and `Transformer.logits`, on the tokens that the layout
names and on no others. Products and attention are in the compute dtype, what lies between them in
float32, in place where that saves memory traffic: on CPUs these passes cost as much as the
products do.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from archerchat.evals.core.layout import Block, Layout, Level
from archerchat.model import transformer
from archerchat.model.flops import SMEAR_CHANNELS, VALUE_GATE_CHANNELS
from archerchat.model.transformer import MLP, NORM_EPSILON, QK_GAIN, Attention, Transformer

LOGITS_BYTES = 32 * 2**20
"""Bound on the float32 logits that exist at a time."""
MLP_BYTES = 2**20
"""Bound on an MLP's inner activations at a time on CPUs: they should stay in a core's cache."""


@dataclass(frozen=True)
class Scores:
    """What a batch's targets got, in the order of the layout's pairs."""

    losses: Tensor
    """(n,) in nats."""
    margins: Tensor | None
    """(n,) the target's logit less the highest of the others, where it was asked for."""


@torch.no_grad()
def score(model: Transformer, layout: Layout, margins: bool) -> Scores:
    """Score every target of a batch, the logits of a few hundred positions at a time.

    Args:
        margins: whether to compare each target with the other tokens too.
    """
    hidden = scored_hidden(model, layout)
    sources, targets = (torch.from_numpy(x) for x in (layout.pair_source, layout.pair_target))
    chunk = max(1, LOGITS_BYTES // (4 * model.config.vocab_size))
    starts = range(0, hidden.size(0), chunk)
    bounds = torch.searchsorted(sources, torch.tensor([*starts, hidden.size(0)])).tolist()
    sources, targets = sources.to(hidden.device), targets.to(hidden.device)
    losses, gaps = [], []
    for start, (first, last) in zip(starts, itertools.pairwise(bounds), strict=True):
        logits = model.logits(hidden[start : start + chunk])
        rows, labels = sources[first:last] - start, targets[first:last]
        chosen = logits[rows, labels]
        losses.append(logits.logsumexp(dim=1)[rows] - chosen)
        if margins:
            values, tokens = logits.topk(2, dim=1)
            rivals = torch.where(tokens[rows, 0] == labels, values[rows, 1], values[rows, 0])
            gaps.append(chosen - rivals)
    return Scores(torch.cat(losses), torch.cat(gaps) if margins else None)


@dataclass
class Stream:
    """What goes from layer to layer, a row a token, in float32."""

    x: Tensor
    """(n, C), the residual stream."""
    x0: Tensor
    """(n, C), the model's input."""
    middle: Tensor | None
    """(n, C), the stream after the middle layer."""
    token_ids: Tensor
    cos: Tensor
    """(n, 1, D/2)."""
    sin: Tensor

    def keep(self, kept: Tensor | None) -> None:
        """Drop the tokens that do not go on."""
        if kept is None:
            return
        self.x0, self.token_ids = self.x0.index_select(0, kept), self.token_ids[kept]
        self.cos, self.sin = self.cos.index_select(0, kept), self.sin.index_select(0, kept)
        if self.middle is not None:
            self.middle = self.middle.index_select(0, kept)


@torch.no_grad()
def scored_hidden(model: Transformer, layout: Layout) -> Tensor:
    """Return the unembedding's input (n, C) at the layout's scored tokens."""
    device, config, dtype = model.device, model.config, model.compute_dtype
    stream, masks = _embed(model, layout), Masks(layout, device, dtype)
    residual, inputs = model.residual_lambdas.tolist(), model.input_lambdas.tolist()
    for i, block in enumerate(model.blocks):
        level = layout.levels[i]
        kept = None if level.kept is None else torch.from_numpy(level.kept).to(device)
        value = None
        if config.has_value_embedding(i):
            value = model.value_embeddings[str(i)](stream.token_ids).to(dtype)
        x = stream.x.mul_(residual[i]).add_(stream.x0, alpha=inputs[i])
        h = _norm(x, dtype)
        stream.x = x if kept is None else x.index_select(0, kept)
        out = _attention(block.attention, level, masks, h, kept, value, stream)  # type: ignore[arg-type]
        stream.x.add_(out)
        _add_mlp(block.mlp, stream.x, dtype)  # type: ignore[arg-type]
        stream.keep(kept)
        if i == config.num_layers // 2:
            stream.middle = stream.x.clone()
    assert stream.middle is not None
    scored = torch.from_numpy(layout.scored).to(device)
    x, middle = stream.x.index_select(0, scored), stream.middle.index_select(0, scored)
    return transformer.back_out(x, middle, model.backout_lambda).to(dtype)


def _inverse_rms(x: Tensor) -> Tensor:
    """Return 1 / rms over the last dimension, (..., 1) float32."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return length.square_().div_(x.size(-1)).add_(NORM_EPSILON).rsqrt_()


def _norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x * _inverse_rms(x)).to(dtype)


def _embed(model: Transformer, layout: Layout) -> Stream:
    device, dtype = model.device, model.compute_dtype
    token_ids = torch.from_numpy(layout.token_ids).to(device)
    previous_ids = torch.from_numpy(layout.previous_ids).to(device)
    x, before = (
        _norm(model.token_embedding(ids).float(), torch.float32)
        for ids in (token_ids, previous_ids.clamp(min=0))
    )
    gate = torch.sigmoid(model.smear_gate(x[:, :SMEAR_CHANNELS].to(dtype)).float())
    gate = gate * model.smear_lambda.float() * (previous_ids >= 0)[:, None]
    x = x.addcmul_(gate, before)
    positions = torch.from_numpy(layout.positions).to(device)
    cos, sin = transformer.rotary_tables(positions, model.config.head_dim, torch.float32)
    return Stream(x, x.clone(), None, token_ids, cos, sin)


def _attention(
    layer: Attention,
    level: Level,
    masks: Masks,
    h: Tensor,
    kept: Tensor | None,
    value_embedding: Tensor | None,
    stream: Stream,
) -> Tensor:
    """Map normalised activations (n_in, C) to the branch's output (n_out, C)."""
    dim, kv_heads = layer.head_dim, layer.num_kv_heads
    v = layer.value(h).view(-1, kv_heads, dim)
    if layer.value_gate is not None:
        assert value_embedding is not None
        gate = 3 * torch.sigmoid(layer.value_gate(h[:, :VALUE_GATE_CHANNELS]))  # (n, K)
        v = torch.addcmul(v, gate[..., None], value_embedding.view_as(v))
    cos, sin = stream.cos, stream.sin
    k = _rotate(layer.key(h).view(-1, kv_heads, dim), cos, sin)
    if kept is not None:
        h, cos, sin = (x.index_select(0, kept) for x in (h, cos, sin))
    q = _rotate(layer.query(h).view(-1, layer.num_heads, dim), cos, sin)
    y = torch.empty_like(q)
    for block in level.blocks:
        queries = slice(block.first_query, block.last_query)
        keys = slice(block.first_key, block.last_key)
        part, k_part, v_part = (
            x.transpose(0, 1)[None] for x in (q[queries], k[keys], v[keys])
        )  # (1, H or K, T, D)
        out = F.scaled_dot_product_attention(
            part, k_part, v_part, attn_mask=masks.of(level, block), enable_gqa=kv_heads < q.size(1)
        )
        y[queries] = out[0].transpose(0, 1)
    result: Tensor = layer.output(y.flatten(1))
    return result


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Normalise (n, heads, D) and rotate it by its positions; a rotation keeps the norm."""
    dtype, half = x.dtype, x.size(-1) // 2
    x = x.float()
    x = x.mul_(_inverse_rms(x).mul_(QK_GAIN))
    out = torch.empty_like(x)
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=-1)
    return out.to(dtype)


def _add_mlp(mlp: MLP, x: Tensor, dtype: torch.dtype) -> None:
    """Add the MLP of the normalised stream (n, C) to it."""
    inner = mlp.up.weight.size(0) if mlp.up.weight.dim() else 4 * x.size(1)
    on_cpu = x.device.type == "cpu"
    rows = max(64, MLP_BYTES // (inner * dtype.itemsize)) if on_cpu else x.size(0)
    for part in x.split(rows):
        u = mlp.up(_norm(part, dtype)).relu_()
        part.add_(mlp.down(u.mul_(u)))


@dataclass
class Masks:
    """What each block adds to its scores, made once for layers that are alike."""

    layout: Layout
    device: torch.device
    dtype: torch.dtype
    made: dict[tuple[int, Block], Tensor] = field(default_factory=dict)

    def of(self, level: Level, block: Block) -> Tensor:
        """Return (queries, keys): 0 where a query sees a key, else minus infinity."""
        queries = block.last_query - block.first_query
        keys = block.last_key - block.first_key
        if block.is_band:
            return _band(queries, keys, level.window, self.device, self.dtype)
        name = id(level), block
        if name not in self.made:
            self.made[name] = self._build(level, block)
        return self.made[name]

    def _build(self, level: Level, block: Block) -> Tensor:
        layout = self.layout
        rows = level.outgoing[block.first_query : block.last_query][:, None]
        columns = level.incoming[block.first_key : block.last_key][None, :]
        branch = layout.branch[columns]
        seen = (
            (layout.tree[rows] == layout.tree[columns])
            & ((branch < 0) | (branch == layout.branch[rows]))
            & (columns <= rows)
            & (layout.positions[columns] >= layout.positions[rows] - level.window)
        )
        return _bias(torch.from_numpy(seen).to(self.device), self.dtype)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return zeros.masked_fill_(~seen, -math.inf)


@functools.lru_cache(maxsize=256)
def _band(
    queries: int, keys: int, window: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the mask of a block whose last query is its last key."""
    here = torch.arange(keys - queries, keys, device=device)[:, None]
    there = torch.arange(keys, device=device)[None, :]
    return _bias((there <= here) & (there >= here - window), dtype)
