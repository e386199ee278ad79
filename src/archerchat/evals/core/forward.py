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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from archerchat.evals.core.layout import Index, Layout, Level, QueryBlock
from archerchat.model.flops import SMEAR_CHANNELS, VALUE_GATE_CHANNELS
from archerchat.model.loss import LOGIT_CAP
from archerchat.model.transformer import (
    MLP,
    NORM_EPSILON,
    Attention,
    Block,
    Transformer,
    rotary_tables,
)

CPU_BLOCK = 128
"""Queries that attend together on CPUs: small ones skip more of what windows hide."""
BLOCK = 2048
"""The same on accelerators, where a block should fill the device."""
LOGITS_BYTES = 64 * 2**20
"""Bound on the float32 logits that exist at a time."""
CPU_LOGITS_BYTES = 4 * 2**20
"""The same on CPUs, where they should stay in the cache."""
ROWS = 64
"""Rows come in multiples of this: on CPUs every new number of rows costs a product its plan."""
MLP_BYTES = 2**20
"""Bound on an MLP's inner activations at a time on CPUs: they should stay in a core's cache."""


Scores = tuple[Tensor, Tensor | None]
"""Losses (n,) in nats of a batch's targets, in the order of the layout's pairs, and where they were
asked for margins (n,): a target's logit less the highest of the others."""


class Scorer:
    """Score batches with one model.

    Args:
        model: best one for inference (`InferenceModel`); its weights are read at each batch, its
            lambdas here.

    Attributes:
        windows: of the model's layers, for the layouts.
        block: the most queries that should attend together.
    """

    def __init__(self, model: Transformer) -> None:
        self.model, self.windows = model, model.config.windows
        self.block = CPU_BLOCK if model.device.type == "cpu" else BLOCK
        self._residual, self._inputs = [1.0] * len(model.blocks), [0.0] * len(model.blocks)
        if model.residual_lambdas is not None and model.input_lambdas is not None:
            self._residual = model.residual_lambdas.tolist()
            self._inputs = model.input_lambdas.tolist()

    @torch.no_grad()
    def score(self, layout: Layout, margins: bool) -> Scores:
        """Score every target of a batch, the logits of some positions at a time.

        Args:
            margins: whether to compare each target with the other tokens too.
        """
        model, hidden = self.model, self.scored_hidden(layout)
        sources, targets = (torch.from_numpy(x) for x in (layout.pair_source, layout.pair_target))
        budget = CPU_LOGITS_BYTES if hidden.device.type == "cpu" else LOGITS_BYTES
        chunk = max(1, budget // (4 * model.config.padded_vocab_size))
        starts = range(0, hidden.size(0), chunk)
        bounds = torch.searchsorted(sources, torch.tensor([*starts, hidden.size(0)])).tolist()
        sources, targets = sources.to(hidden.device), targets.to(hidden.device)
        losses, gaps = [], []
        for start, (first, last) in zip(starts, itertools.pairwise(bounds), strict=True):
            raw = model.unembedding(hidden[start : start + chunk])[:, : model.config.vocab_size]
            logits = raw.float().div_(LOGIT_CAP).tanh_().mul_(LOGIT_CAP)
            rows, labels = sources[first:last] - start, targets[first:last]
            chosen = logits[rows, labels]
            if margins:
                values, tokens = logits.topk(2, dim=1)
                rivals = torch.where(tokens[rows, 0] == labels, values[rows, 1], values[rows, 0])
                gaps.append(chosen - rivals)
            # The cap bounds every logit by 15: their exponentials need no maximum taken off first.
            losses.append(logits.exp_().sum(dim=1).log_()[rows] - chosen)
        return torch.cat(losses), torch.cat(gaps) if margins else None

    @torch.no_grad()
    def scored_hidden(self, layout: Layout) -> Tensor:
        """Return the unembedding's input (n, C) at the layout's scored tokens."""
        model, device, dtype = self.model, self.model.device, self.model.compute_dtype
        masks, token_ids = Masks(layout, device, dtype), _rounded(layout.token_ids, device)
        positions = _rounded(layout.positions, device)
        cos, sin = rotary_tables(positions, model.config.head_dim, torch.float32)
        x = _embed(model, token_ids, _rounded(layout.previous_ids, device))  # (n, C) float32
        x0 = middle = x.clone()
        for i, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            level = layout.levels[i]
            kept = None if level.kept is None else _rounded(level.kept, device)
            value = None
            if model.config.has_value_embedding(i):
                value = model.value_embeddings[str(i)](token_ids).to(dtype)
            x.mul_(self._residual[i]).add_(x0, alpha=self._inputs[i])
            h = _norm(x, dtype)
            branch = _attention(block.attention, level, masks, h, kept, value, cos, sin)
            if kept is not None:
                rows = x, x0, middle, token_ids, cos, sin
                x, x0, middle, token_ids, cos, sin = (row.index_select(0, kept) for row in rows)
            x.add_(branch)
            _add_mlp(block.mlp, x, dtype)
            if i == model.config.num_layers // 2:
                middle = x.clone()
        scored = _rounded(layout.scored, device)
        x, middle = x.index_select(0, scored), middle.index_select(0, scored)
        if model.backout_lambda is not None:
            x = x - model.backout_lambda.float() * middle
        return _norm(x, dtype)


def _rounded(rows: np.ndarray, device: torch.device) -> Tensor:
    """Return `rows`, the last of them repeated up to a multiple of ROWS; nobody reads those."""
    missing = -len(rows) % ROWS if len(rows) else 0
    return torch.from_numpy(np.pad(rows, (0, missing), mode="edge")).to(device)


def _inverse_rms(x: Tensor) -> Tensor:
    """Return 1 / rms over the last dimension, (..., 1) float32."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale: Tensor = length.square_().div_(x.size(-1)).add_(NORM_EPSILON).rsqrt_()
    return scale


def _norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x * _inverse_rms(x)).to(dtype)


def _embed(model: Transformer, token_ids: Tensor, previous_ids: Tensor) -> Tensor:
    """Return normalised embeddings (n, C) float32, each with its gated copy of the one before."""
    x, before = (
        _norm(model.token_embedding(ids).float(), torch.float32)
        for ids in (token_ids, previous_ids.clamp(min=0))
    )
    if model.smear_gate is None or model.smear_lambda is None:
        return x
    gate = torch.sigmoid(model.smear_gate(x[:, :SMEAR_CHANNELS].to(model.compute_dtype)).float())
    gate = gate * model.smear_lambda.float() * (previous_ids >= 0)[:, None]
    return x.addcmul_(gate, before)


def _attention(
    layer: Attention,
    level: Level,
    masks: Masks,
    h: Tensor,
    kept: Tensor | None,
    value_embedding: Tensor | None,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Map normalised activations (n_in, C) to the branch's output (n_out, C)."""
    dim, kv_heads = layer.head_dim, layer.num_kv_heads
    v = layer.value(h).view(-1, kv_heads, dim)
    if layer.value_gate is not None:
        assert value_embedding is not None
        gate = 3 * torch.sigmoid(layer.value_gate(h[:, :VALUE_GATE_CHANNELS]))  # (n, K)
        v = torch.addcmul(v, gate[..., None], value_embedding.view_as(v))
    k = _rotate(layer.key(h).view(-1, kv_heads, dim), cos, sin, layer.qk_gain)
    if kept is not None:
        h, cos, sin = (x.index_select(0, kept) for x in (h, cos, sin))
    q = _rotate(layer.query(h).view(-1, layer.num_heads, dim), cos, sin, layer.qk_gain)
    y = torch.empty_like(q)
    y[level.blocks[-1].queries.stop if level.blocks else 0 :] = 0
    for block in level.blocks:
        part, k_part, v_part = (
            x.transpose(0, 1)[None] for x in (q[block.queries], k[block.keys], v[block.keys])
        )  # (1, H or K, T, D)
        out = F.scaled_dot_product_attention(
            part, k_part, v_part, attn_mask=masks.of(level, block), enable_gqa=kv_heads < q.size(1)
        )
        y[block.queries] = out[0].transpose(0, 1)
    result: Tensor = layer.output(y.flatten(1))
    return result


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, gain: float) -> Tensor:
    """Normalise (n, heads, D), multiply by `gain`, rotate by its positions, which keeps norms."""
    dtype, half = x.dtype, x.size(-1) // 2
    x = x.float()
    x = x.mul_(_inverse_rms(x).mul_(gain))
    out = torch.empty_like(x)
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=-1)
    return out.to(dtype)


def _add_mlp(mlp: MLP, x: Tensor, dtype: torch.dtype) -> None:
    """Add the MLP of the normalised stream (n, C) to it."""
    on_cpu = x.device.type == "cpu"
    fitting = MLP_BYTES // (4 * x.size(1) * dtype.itemsize) // ROWS * ROWS
    rows = max(ROWS, fitting) if on_cpu else x.size(0)
    for start in range(0, x.size(0), rows):
        part = x[start : start + rows]
        u = mlp.up(_norm(part, dtype)).relu_()
        part.add_(mlp.down(u.mul_(u)))


class Masks:
    """What each block adds to its scores, made once for layers that are alike."""

    def __init__(self, layout: Layout, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._tree, self._branch, self._position = (
            torch.from_numpy(part).to(device)
            for part in (layout.tree, layout.branch, layout.positions)
        )
        self._made: dict[int, Tensor] = {}

    def of(self, level: Level, block: QueryBlock) -> Tensor:
        """Return (queries, keys): 0 where a query sees a key, else minus infinity."""
        rows, columns = level.outgoing[block.queries], level.incoming[block.keys]
        if block.is_band:
            return _band(len(rows), len(columns), level.window, self.device, self.dtype)
        if id(block) not in self._made:
            self._made[id(block)] = self._build(rows, columns, level.window)
        return self._made[id(block)]

    def _build(self, queries: Index, keys: Index, window: int) -> Tensor:
        rows, columns = (torch.from_numpy(part).to(self.device) for part in (queries, keys))
        branch, tree, position = self._branch[columns], self._tree, self._position
        seen = (tree[rows][:, None] == tree[columns]) & (columns <= rows[:, None])
        seen &= (branch < 0) | (branch == self._branch[rows][:, None])
        seen &= position[columns] >= (position[rows] - window)[:, None]
        return _bias(seen, self.dtype)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return zeros.masked_fill_(~seen, -math.inf)


def _band(queries: int, keys: int, window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the mask of a block whose last query is its last key: a corner of a larger one."""
    rows, columns = (1 << (size - 1).bit_length() for size in (queries, keys))
    reach = min(window, columns)
    corner = _large_band(rows, columns, reach, device, dtype)[-queries:, -keys:]
    return corner if device.type == "cpu" else corner.contiguous()  # kernels ask for alignment


@functools.lru_cache(maxsize=16)
def _large_band(
    queries: int, keys: int, window: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    here = torch.arange(keys - queries, keys, device=device)[:, None]
    there = torch.arange(keys, device=device)[None, :]
    return _bias((there <= here) & (there >= here - window), dtype)
