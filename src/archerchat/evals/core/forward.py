"""Run a laid-out batch of trees through a model and score its targets.

The same formulas as `Transformer.hidden` and `Transformer.logits`, on the tokens that the layout
names and on no others. `score` returns for each target the loss in nats and how far the target's
logit is above the best of the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from archerchat.evals.core.layout import Index, Layout, Level
from archerchat.model.flops import VALUE_GATE_CHANNELS
from archerchat.model.transformer import (
    QK_GAIN,
    SMEAR_CHANNELS,
    Attention,
    Block,
    Transformer,
    back_out,
    norm,
    rotary_tables,
    rotate,
)

QUERY_BLOCK = 128
"""Queries of a trunk at a time, so that windows skip what they hide."""
LOGITS_BYTES = 32 * 2**20
"""Bound on the float32 logits that exist at a time."""


@dataclass
class Stream:
    """What goes from layer to layer, a row a token."""

    x: Tensor
    """(N, C), the residual stream."""
    x0: Tensor
    """(N, C), the model's input."""
    middle: Tensor | None
    """(N, C), the stream after the middle layer."""
    token_ids: Tensor
    cos: Tensor
    """(N, 1, D/2)."""
    sin: Tensor

    def keep(self, kept: Tensor | None) -> None:
        """Drop the tokens that are not needed any more."""
        if kept is None:
            return
        self.x0, self.token_ids = self.x0[kept], self.token_ids[kept]
        self.cos, self.sin = self.cos[kept], self.sin[kept]
        if self.middle is not None:
            self.middle = self.middle[kept]


def score(model: Transformer, layout: Layout, margins: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return each target's loss (n,); its margin and the predicted token where asked for.

    The margin is the target's logit less the highest of the others.
    """
    hidden = scored_hidden(model, layout)
    device = hidden.device
    source = torch.from_numpy(layout.pair_source)
    target = torch.from_numpy(layout.pair_target).to(device)
    chunk = max(1, LOGITS_BYTES // (4 * model.config.vocab_size))
    bounds = torch.searchsorted(source, torch.arange(0, hidden.size(0) + chunk, chunk)).tolist()
    source = source.to(device)
    losses, gaps, predicted = [], [], []
    for number, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        start = number * chunk
        logits = model.logits(hidden[start : start + chunk])
        rows, labels = source[first:last] - start, target[first:last]
        chosen = logits[rows, labels]
        losses.append(logits.logsumexp(dim=1)[rows] - chosen)
        if margins:
            values, tokens = logits.topk(2, dim=1)
            best, hit = logits.argmax(dim=1)[rows], None
            rival = torch.where(tokens[rows, 0] == labels, values[rows, 1], values[rows, 0])
            gaps.append(chosen - rival)
            predicted.append(best)
    empty = torch.empty(0)
    return (
        torch.cat(losses),
        torch.cat(gaps) if gaps else empty,
        torch.cat(predicted) if predicted else empty,
    )


@torch.no_grad()
def scored_hidden(model: Transformer, layout: Layout) -> Tensor:
    """Return the unembedding's input (n, C) at the layout's scored tokens."""
    device, config = model.device, model.config
    stream = _embed(model, layout)
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        value = None
        if config.has_value_embedding(i):
            value = model.value_embeddings[str(i)](stream.token_ids).to(model.compute_dtype)
        level = layout.levels[i]
        x = model.residual_lambdas[i] * stream.x + model.input_lambdas[i] * stream.x0
        x = x.to(model.compute_dtype)
        kept = None if level.kept is None else torch.from_numpy(level.kept).to(device)
        out = _attention(
            block.attention, level, layout.key_lengths[i], kept, norm(x), value, stream
        )
        x = x if kept is None else x[kept]
        x = x + out
        stream.x = x + block.mlp(norm(x))
        stream.keep(kept)
        if i == config.num_layers // 2:
            stream.middle = stream.x
    assert stream.middle is not None
    scored = torch.from_numpy(layout.scored).to(device)
    return back_out(stream.x[scored], stream.middle[scored], model.backout_lambda)


def _embed(model: Transformer, layout: Layout) -> Stream:
    device, dtype = model.device, model.compute_dtype
    token_ids = torch.from_numpy(layout.token_ids).to(device)
    previous_ids = torch.from_numpy(layout.previous_ids).to(device)
    x = norm(model.token_embedding(token_ids).to(dtype))
    before = norm(model.token_embedding(previous_ids.clamp(min=0)).to(dtype))
    before = before * (previous_ids >= 0)[:, None]
    gate = torch.sigmoid(model.smear_gate(x[:, :SMEAR_CHANNELS]))
    x = x + model.smear_lambda.to(dtype) * gate * before
    positions = torch.from_numpy(layout.positions).to(device)
    cos, sin = rotary_tables(positions, model.config.head_dim, dtype)
    return Stream(x, x, None, token_ids, cos, sin)


def _attention(
    layer: Attention,
    level: Level,
    key_lengths: Index,
    kept: Tensor | None,
    h: Tensor,
    value_embedding: Tensor | None,
    stream: Stream,
) -> Tensor:
    """Map normalised activations (n_in, C) to the branch's output (n_out, C)."""
    heads, kv_heads, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
    k = layer.key(h).view(-1, kv_heads, dim)
    v = layer.value(h).view(-1, kv_heads, dim)
    if layer.value_gate is not None:
        assert value_embedding is not None
        gate = 3 * torch.sigmoid(layer.value_gate(h[:, :VALUE_GATE_CHANNELS]))  # (n, K)
        v = v + gate[..., None] * value_embedding.view_as(v)
    cos, sin = stream.cos, stream.sin
    k = norm(rotate(k, cos, sin)) * QK_GAIN
    if kept is not None:
        h, cos, sin = h[kept], cos[kept], sin[kept]
    q = norm(rotate(layer.query(h).view(-1, heads, dim), cos, sin)) * (QK_GAIN / math.sqrt(dim))
    out: Tensor = layer.output(_attend(q, k, v, level, key_lengths, layer.window))
    return out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, level: Level, key_lengths: Index, window: int
) -> Tensor:
    """Attend from (n_out, H, D), already scaled, to (n_in, K, D); return (n_out, H * D)."""
    device, (_, heads, dim), groups = q.device, q.shape, q.size(1) // k.size(1)
    rows, longest = level.trunk_keys.shape
    trunk_k, trunk_v = (_gather(x, level.trunk_keys).movedim(2, 1) for x in (k, v))  # (B, K, L, D)
    hidden = None
    if level.padded:
        first = torch.from_numpy(longest - key_lengths).to(device)
        hidden = torch.arange(longest, device=device)[None, :] < first[:, None]  # (B, L)
    parts = []
    if level.trunk_queries.shape[1]:
        trunk_q = _by_group(_gather(q, level.trunk_queries), groups)  # (B, K, G, T, D)
        out = _attend_trunk(trunk_q, trunk_k, trunk_v, window, hidden)
        parts.append(_flatten_groups(out).reshape(-1, heads * dim))
    if level.branch_queries.size:
        own_k, own_v = (_gather(x, level.branch_keys).movedim(3, 2) for x in (k, v))
        branch_q = _by_group(_gather(q, level.branch_queries), groups)  # (B, O, K, G, S, D)
        out = _attend_branches(branch_q, own_k, own_v, trunk_k, trunk_v, window, hidden)
        parts.append(_flatten_groups(out).reshape(-1, heads * dim))
    joined = torch.cat(parts) if len(parts) > 1 else parts[0]
    return joined[torch.from_numpy(level.back).to(device)]


def _gather(x: Tensor, indices: Index) -> Tensor:
    """Return x's rows (n, ...) at indices (...), in their shape."""
    flat = torch.from_numpy(indices.ravel()).to(x.device)
    return x.index_select(0, flat).view(*indices.shape, *x.shape[1:])


def _by_group(q: Tensor, groups: int) -> Tensor:
    """Map (..., T, H, D) to (..., K, G, T, D): the heads of each key head together."""
    return q.unflatten(-2, (-1, groups)).movedim(-4, -2)


def _flatten_groups(out: Tensor) -> Tensor:
    """Map (..., K, G, T, D) to (..., T, H, D)."""
    return out.movedim(-2, -4).flatten(-3, -2)


def _attend_trunk(q: Tensor, k: Tensor, v: Tensor, window: int, hidden: Tensor | None) -> Tensor:
    """Attend from the last T positions of rows (B, K, G, T, D) to rows (B, K, L, D)."""
    groups, queries, keys = q.size(2), q.size(3), k.size(2)
    outputs = []
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        here = torch.arange(start, stop, device=q.device)[:, None] + (keys - queries)
        first, end = max(0, keys - queries + start - window), keys - queries + stop
        there = torch.arange(first, end, device=q.device)[None, :]
        masked = (there > here) | (there < here - window)
        if hidden is not None:
            masked = masked | hidden[:, None, None, None, first:end]
        part = q[:, :, :, start:stop].flatten(2, 3)  # (B, K, G * T, D)
        scores = (part @ k[:, :, first:end].mT).unflatten(2, (groups, -1)).float()
        weights = scores.masked_fill_(masked, -math.inf).softmax(dim=-1).to(v.dtype)
        outputs.append((weights.flatten(2, 3) @ v[:, :, first:end]).unflatten(2, (groups, -1)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=3)


def _attend_branches(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    trunk_k: Tensor,
    trunk_v: Tensor,
    window: int,
    hidden: Tensor | None,
) -> Tensor:
    """Attend from branches (B, O, K, G, S, D) to themselves and to their trunks.

    Args:
        own_k: (B, O, K, S, D), likewise own_v; trunk_k: (B, K, L, D), likewise trunk_v.
        hidden: (B, L), the padding of the trunks.

    Returns:
        (B, O, K, G, S, D).
    """
    batch, options, kv_heads, groups, length, dim = q.shape
    reach = min(window, trunk_k.size(2))
    trunk_k, trunk_v = trunk_k[:, :, -reach:], trunk_v[:, :, -reach:]
    together = q.movedim(2, 1).reshape(batch, kv_heads, -1, dim)  # (B, K, O * G * S, D)
    past = (together @ trunk_k.mT).view(batch, kv_heads, options, groups, length, reach)
    own = (q.flatten(3, 4) @ own_k.mT).unflatten(3, (groups, length)).movedim(2, 1)
    step = torch.arange(length, device=q.device)[:, None]
    back = torch.arange(reach, 0, -1, device=q.device)[None, :]  # how far before the branch
    far = back > window - step
    if hidden is not None:
        far = far | hidden[:, None, None, None, None, -reach:]
    other = torch.arange(length, device=q.device)[None, :]
    unseen = (other > step) | (other < step - window)
    scores = torch.cat(
        [past.float().masked_fill(far, -math.inf), own.float().masked_fill(unseen, -math.inf)], -1
    )
    weights = scores.softmax(dim=-1).to(q.dtype)  # (B, K, O, G, S, reach + S)
    from_past = weights[..., :reach].reshape(batch, kv_heads, -1, reach) @ trunk_v
    from_own = weights[..., reach:].movedim(1, 2).flatten(3, 4) @ own_v  # (B, O, K, G * S, D)
    from_past = from_past.view(batch, kv_heads, options, groups, length, dim).movedim(1, 2)
    return from_past + from_own.unflatten(3, (groups, length))
