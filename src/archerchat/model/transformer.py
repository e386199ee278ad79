"""The transformer of SPEC section 2: one file, one forward, every formula in sight.

Master weights are float32 and cast to the compute dtype inside each linear layer; the two
kinds of embedding tables, which only gather, are stored in bfloat16 when that is the compute
dtype. `Transformer.hidden` stops before the unembedding, so that training can form the logits
a few tokens at a time (`model/loss.py`); `forward` returns logits.

Where the parts come from: RMSNorm (https://arxiv.org/abs/1910.07467), rotary positions
(https://arxiv.org/abs/2104.09864), normalised queries and keys (https://arxiv.org/abs/2302.05442),
value embeddings after value residuals (https://arxiv.org/abs/2410.17897), relu squared
(https://arxiv.org/abs/2109.08668), capped logits (https://arxiv.org/abs/2408.00118).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from archerchat.model import fp8
from archerchat.model.attention import Backend, Past, attend, prepare_mask
from archerchat.model.compiling import compiled
from archerchat.model.config import SMEAR_CHANNELS, VALUE_GATE_CHANNELS, ModelConfig
from archerchat.model.loss import LOGIT_CAP

ROTARY_BASE = 100_000.0
NORM_EPSILON = 1.1920929e-07
"""float32's machine epsilon, in bfloat16 too."""


def norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last dimension; there is no learned gain."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPSILON)


def rotary_tables(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (..., T, 1, D/2) of position * base^(-2j/D) for (..., T)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None] * ROTARY_BASE ** (-exponents / head_dim)
    return angles.cos().to(dtype)[..., None, :], angles.sin().to(dtype)[..., None, :]


def rotary_of(rotary: tuple[Tensor, Tensor], kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tables of some of their tokens (n,)."""
    cos, sin = rotary
    return cos.index_select(-3, kept), sin.index_select(-3, kept)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, T, heads, D) by its positions, pairing the first half with the second."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


class Linear(nn.Linear):
    """A bias-free linear layer whose float32 weight is cast to its input's dtype."""

    fp8 = False
    """Whether training multiplies in 8 bits (`Transformer.use_fp8`)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 and torch.is_grad_enabled():
            return fp8.linear(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Causal attention with rotary positions, normalised queries and keys, and GQA."""

    def __init__(self, config: ModelConfig, layer: int, backend: Backend) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.window = config.head_dim, config.windows[layer]
        self.qk_gain, self.backend = config.qk_gain, backend
        self.query = Linear(config.model_dim, config.model_dim)
        self.key = Linear(config.model_dim, config.kv_dim)
        self.value = Linear(config.model_dim, config.kv_dim)
        self.output = Linear(config.model_dim, config.model_dim)
        gated = config.has_value_embedding(layer)
        self.value_gate = Linear(VALUE_GATE_CHANNELS, config.num_kv_heads) if gated else None

    def forward(
        self,
        h: Tensor,
        value_embedding: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        mask: Any = None,
        past: Past | None = None,
        segments: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Map normalised activations (B, T, C) to the output (B, T, C) of the `kept` tokens."""
        batch, asking, of_queries = h.size(0), h, rotary
        if kept is not None:
            asking, of_queries = h.index_select(1, kept), rotary_of(rotary, kept)
        q = self.query(asking).view(batch, -1, self.num_heads, self.head_dim)
        k = self.key(h).view(batch, -1, self.num_kv_heads, self.head_dim)
        v = self.value(h).view(batch, -1, self.num_kv_heads, self.head_dim)
        if self.value_gate is not None:
            assert value_embedding is not None
            gate = 3 * torch.sigmoid(self.value_gate(h[..., :VALUE_GATE_CHANNELS]))  # (B, T, K)
            v = v + gate[..., None] * value_embedding.view_as(v)
        q = norm(rotate(q, *of_queries)) * self.qk_gain
        k = norm(rotate(k, *rotary)) * self.qk_gain
        if past is None:
            y = attend(q, k, v, self.window, self.backend, mask, segments)
        else:
            y = past.attend(q, k, v)
        out: Tensor = self.output(y.flatten(2))
        return out


class MLP(nn.Module):
    """Widen four times, relu squared, narrow again."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.model_dim, 4 * config.model_dim)
        self.down = Linear(4 * config.model_dim, config.model_dim)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.down(F.relu(self.up(h)).square())
        return out


class Block(nn.Module):
    """One layer: the residual mix, then an attention and an MLP branch."""

    def __init__(self, config: ModelConfig, layer: int, backend: Backend) -> None:
        super().__init__()
        self.attention = Attention(config, layer, backend)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        value_embedding: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        residual_lambda: Tensor | None,
        input_lambda: Tensor | None,
        mask: Any = None,
        past: Past | None = None,
        segments: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Map the stream and the model's input (B, T, C) to the new stream, `kept` tokens only."""
        if residual_lambda is not None and input_lambda is not None:
            x = residual_lambda * x + input_lambda * x0
        branch = self.attention(norm(x), value_embedding, rotary, mask, past, segments, kept)
        x = (x if kept is None else x.index_select(1, kept)) + branch
        out: Tensor = x + self.mlp(norm(x))
        return out


def smear(
    x: Tensor,
    gate_weight: Tensor,
    smear_lambda: Tensor,
    previous: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Normalise gathered embeddings (B, T, C) and add to each a gated copy of the one before.

    Args:
        previous: as in `Before`. By default a row's tokens follow one another; the first has none.
        segments: (B, T) numbers of packed documents, whose first tokens have none before them.
    """
    x = norm(x)
    if previous is None:
        first, here, before = x[:, :1], x[:, 1:], x[:, :-1]
    else:
        first, here, before = x[:, :0], x, previous
    gate = torch.sigmoid(F.linear(here[..., :SMEAR_CHANNELS], gate_weight.to(x.dtype)))
    if segments is not None:
        assert previous is None, "packed rows begin at their first token"
        gate = gate * (segments[:, 1:] == segments[:, :-1])[..., None]
    return torch.cat([first, here + smear_lambda.to(x.dtype) * gate * before], dim=1)


def back_out(x: Tensor, middle: Tensor, backout_lambda: Tensor) -> Tensor:
    """Subtract part of the middle layer's stream from the last one's and normalise."""
    return norm(x - backout_lambda.to(x.dtype) * middle)


@dataclass(frozen=True)
class Before:
    """What comes before each of the tokens that a forward pass is given."""

    positions: Tensor
    """(T,) or (B, T): positions of the given tokens."""
    previous: Tensor
    """(B, T, C): normalised embedding of the token before each, zeros where there is none."""
    layers: Sequence[Past]
    kept: Sequence[Tensor | None] = ()
    """Per layer the places (n,) of the tokens that matter later, among those that went in; the
    others are not computed beyond keys and values. None keeps all; if empty, every layer does."""


@dataclass(frozen=True)
class Regions:
    """The functions that a forward pass is made of, as they are or compiled.

    One graph then serves every layer of a kind, so that compile time does not grow with depth.
    """

    smear: Callable[..., Tensor] = smear
    block: Callable[..., Tensor] = Block.forward
    back_out: Callable[..., Tensor] = back_out

    @classmethod
    def compiled(cls, dynamic: bool = False) -> Regions:
        """Compile each region: for the fixed shapes of a training step, or once for all shapes."""
        # `flash` runs between two graphs.
        block = compiled(Block.forward, whole=False, dynamic=dynamic)
        return cls(compiled(smear, dynamic=dynamic), block, compiled(back_out, dynamic=dynamic))


class Transformer(nn.Module):
    """Predict the next token's logits.

    Args:
        compute_dtype: of activations and matrix products.
        backend: the attention backend of every layer (`attention.choose_backend`).
    """

    def __init__(
        self,
        config: ModelConfig,
        compute_dtype: torch.dtype = torch.float32,
        backend: Backend = "sdpa",
    ) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.backend: Backend = backend
        self.recomputes = False
        """Whether the backward pass computes each layer again instead of keeping its values."""
        layers, dim, vocab = range(config.num_layers), config.model_dim, config.padded_vocab_size
        self.token_embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(config, layer, backend) for layer in layers)
        mixing = filter(config.has_value_embedding, layers)
        tables = {str(i): nn.Embedding(vocab, config.kv_dim) for i in mixing}
        self.value_embeddings = nn.ModuleDict(tables)
        self.unembedding = Linear(dim, vocab)

        def scalars(count: int, used: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(count)) if used else None

        self.residual_lambdas = scalars(len(layers), config.residual_lambdas)
        self.input_lambdas = scalars(len(layers), config.residual_lambdas)
        self.smear_gate = Linear(SMEAR_CHANNELS, 1) if config.smear else None
        self.smear_lambda = scalars(1, config.smear)
        self.backout_lambda = scalars(1, config.backout)
        if compute_dtype == torch.bfloat16:
            for table in (self.token_embedding, *self.value_embeddings.values()):
                table.to(torch.bfloat16)

    @property
    def device(self) -> torch.device:
        return self.unembedding.weight.device

    def use_fp8(self, used: bool) -> None:
        """Train the blocks' large matrices in 8 bits, or no longer; evaluation never does."""
        for layer in self.blocks.modules():
            if isinstance(layer, Linear):
                layer.fp8 = used and fp8.fits_fp8(layer)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw the initial values of SPEC section 2, the same on every device for one seed."""
        generator = torch.Generator().manual_seed(seed)

        def normal(parameter: Tensor, std: float) -> None:
            parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))

        def uniform(parameter: Tensor, low: float, high: float) -> None:
            parameter.copy_(torch.empty(parameter.shape).uniform_(low, high, generator=generator))

        layers, bound = self.config.num_layers, math.sqrt(3 / self.config.model_dim)
        normal(self.token_embedding.weight, 0.8)
        normal(self.unembedding.weight, 0.001)
        for block in cast(Iterable[Block], self.blocks):
            attention, mlp = block.attention, block.mlp
            for matrix in (attention.query, attention.key, attention.value):
                uniform(matrix.weight, -bound, bound)
            uniform(mlp.up.weight, -0.4 * bound, 0.4 * bound)
            attention.output.weight.zero_()
            mlp.down.weight.zero_()
            if attention.value_gate is not None:
                uniform(attention.value_gate.weight, 0.0, 0.02)
        for table in cast(Iterable[nn.Embedding], self.value_embeddings.values()):
            uniform(table.weight, -bound, bound)
        if self.smear_gate is not None and self.smear_lambda is not None:
            uniform(self.smear_gate.weight, 0.0, 0.02)
            self.smear_lambda.zero_()
        depth = torch.arange(layers) / max(layers - 1, 1)
        if self.residual_lambdas is not None and self.input_lambdas is not None:
            self.residual_lambdas.copy_(1.15 - 0.10 * depth)
            self.input_lambdas.copy_(0.20 - 0.15 * depth)
        if self.backout_lambda is not None:
            self.backout_lambda.fill_(0.2)

    def hidden(
        self,
        token_ids: Tensor,
        regions: Regions | None = None,
        before: Before | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Map token ids (B, T) to the unembedding's input (B, T, C) in the compute dtype.

        Args:
            before: a cache of the tokens before these; without it they begin their rows.
            segments: (B, T) numbers of the packed documents, to keep them from seeing each other.
        """
        assert before is None or segments is None, "a cache holds one document per row"
        run, layers, windows = regions or Regions(), self.config.num_layers, self.config.windows
        length = token_ids.size(1)
        positions = before.positions if before else torch.arange(length, device=self.device)
        rotary = rotary_tables(positions, self.config.head_dim, self.compute_dtype)
        x0 = x = middle = self._embed(token_ids, run, before, segments)
        lambdas = [
            [None] * layers if each is None else each.unbind()
            for each in (self.residual_lambdas, self.input_lambdas)
        ]
        masks: dict[int, Any] = {}
        if regions is not None and before is None:  # for compiled code, which cannot make them
            for window in set(windows):
                masks[window] = prepare_mask(length, window, self.device, self.backend, segments)
        for i, block in enumerate(self.blocks):
            value = None
            if self.config.has_value_embedding(i):
                value = self.value_embeddings[str(i)](token_ids).to(self.compute_dtype)
            past = before.layers[i] if before else None
            kept = before.kept[i] if before and before.kept else None
            mixing, mask = (lambdas[0][i], lambdas[1][i]), masks.get(windows[i])
            given = block, x, x0, value, rotary, *mixing, mask, past, segments, kept
            if self.recomputes and torch.is_grad_enabled():  # https://arxiv.org/abs/1604.06174
                x = checkpoint(run.block, *given, use_reentrant=False)
            else:
                x = run.block(*given)
            if kept is not None:
                token_ids, x0, middle = (t.index_select(1, kept) for t in (token_ids, x0, middle))
                rotary = rotary_of(rotary, kept)
            if i == layers // 2:
                middle = x
        if self.backout_lambda is None:
            return norm(x)
        return run.back_out(x, middle, self.backout_lambda)

    def _embed(
        self, token_ids: Tensor, run: Regions, before: Before | None, segments: Tensor | None
    ) -> Tensor:
        """Return the first layer's input (B, T, C)."""
        x = self.token_embedding(token_ids).to(self.compute_dtype)
        if self.smear_gate is None:
            return norm(x)
        previous = before.previous if before else None
        return run.smear(x, self.smear_gate.weight, self.smear_lambda, previous, segments)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map the unembedding's input (..., C) to capped float32 logits (..., vocab_size)."""
        logits = self.unembedding(hidden)[..., : self.config.vocab_size]
        return LOGIT_CAP * torch.tanh(logits.float() / LOGIT_CAP)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Map token ids (B, T) to capped float32 logits (B, T, vocab_size)."""
        return self.logits(self.hidden(token_ids))
