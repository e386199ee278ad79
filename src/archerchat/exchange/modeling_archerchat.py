"""ArcherChat's architecture for `transformers`, in one file that travels with the weights.

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

No class of the library has its value embeddings, smear (a gated copy of the token before), lambdas
(scales of the residual stream and of the input in each layer), backout (a part of the middle layer
that the end subtracts) and windows. A cache also keeps the token ids, in a layer behind the
attention's: the smear of the next token needs the one before it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

NORM_EPSILON = 1.1920929e-07
ROTARY_BASE = 100_000.0
LOGIT_CAP = 15.0
SMEAR_CHANNELS = 24
VALUE_GATE_CHANNELS = 12
VOCAB_ALIGNMENT = 64
# What the library calls the cache changed within version 5.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class ArcherChatConfig(PretrainedConfig):
    """The shape of a model; config.json has every field of it."""

    model_type = "archerchat"

    def has_value_embedding(self, layer: int) -> bool:
        return bool(self.value_embeddings) and layer % 2 == (self.num_hidden_layers - 1) % 2


def norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last dimension."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPSILON)


def rotary_tables(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (B, T, 1, D/2) for positions (B, T)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None] * ROTARY_BASE ** (-exponents / head_dim)
    return angles.cos().to(dtype)[..., None, :], angles.sin().to(dtype)[..., None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, T, heads, D), pairing the first half with the second."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class ArcherChatAttention(nn.Module):
    """Causal attention over the keys that a mask shows."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        dim, self.layer, self.qk_gain = config.hidden_size, layer, config.qk_gain
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = dim // self.num_heads
        self.query, self.output = linear(dim, dim), linear(dim, dim)
        self.key = linear(dim, self.num_kv_heads * self.head_dim)
        self.value = linear(dim, self.num_kv_heads * self.head_dim)
        if config.has_value_embedding(layer):
            self.value_gate = linear(VALUE_GATE_CHANNELS, self.num_kv_heads)

    def forward(
        self, h: Tensor, table: Tensor | None, rotary: Any, mask: Tensor, cache: Any, slots: Tensor
    ) -> Tensor:
        q, k, v = (
            each(h).view(*h.shape[:2], -1, self.head_dim)
            for each in (self.query, self.key, self.value)
        )  # (B, T, H or K, D)
        if table is not None:
            gate = 3 * torch.sigmoid(self.value_gate(h[..., :VALUE_GATE_CHANNELS]))  # (B, T, K)
            v = v + gate[..., None] * table.view_as(v)
        q, k = (norm(rotate(x, *rotary)) * self.qk_gain for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer, {"cache_position": slots})
        shared = self.num_heads != self.num_kv_heads
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared)
        return self.output(y.transpose(1, 2).flatten(2))


class ArcherChatMLP(nn.Module):
    """Widen four times, square the positive part, narrow again."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = linear(dim, 4 * dim), linear(4 * dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        return self.down(F.relu(self.up(h)).square())


class ArcherChatBlock(GradientCheckpointingLayer):
    """One layer, without the lambdas."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.attention = ArcherChatAttention(config, layer)
        self.mlp = ArcherChatMLP(config.hidden_size)

    def forward(self, x: Tensor, *of_attention: Any) -> Tensor:
        x = x + self.attention(norm(x), *of_attention)
        return x + self.mlp(norm(x))


class ArcherChatForCausalLM(PreTrainedModel, GenerationMixin):
    """Predict the next token's logits; names of the weights are ArcherChat's own."""

    config_class = ArcherChatConfig
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True
    _no_split_modules = ("ArcherChatBlock",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers, dim = range(config.num_hidden_layers), config.hidden_size
        kv_dim = dim // config.num_attention_heads * config.num_key_value_heads
        vocab = -(-config.vocab_size // VOCAB_ALIGNMENT) * VOCAB_ALIGNMENT
        self.token_embedding, self.unembedding = nn.Embedding(vocab, dim), linear(dim, vocab)
        self.blocks = nn.ModuleList(ArcherChatBlock(config, layer) for layer in layers)
        own = filter(config.has_value_embedding, layers)
        self.value_embeddings = nn.ModuleDict({str(i): nn.Embedding(vocab, kv_dim) for i in own})
        if config.residual_lambdas:
            self._keep_in_fp32_modules_strict = {"residual_lambdas", "input_lambdas"}
            self.residual_lambdas = nn.Parameter(torch.ones(len(layers)))
            self.input_lambdas = nn.Parameter(torch.zeros(len(layers)))
        if config.smear:
            self.smear_gate = linear(SMEAR_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:  # the library would take the first parameter's
        return self.token_embedding.weight.dtype

    def get_input_embeddings(self) -> nn.Module:  # and no setter: value embeddings are as long
        return self.token_embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.unembedding

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **others: Any) -> Tensor | None:
        """Return the mask (B, T) as long as a static cache, so that its shape never changes."""
        cache = others.get("cache", others.get("past_key_values"))
        if attention_mask is None or cache is None:
            return attention_mask
        return F.pad(attention_mask, (0, cache.layers[0].max_cache_len - attention_mask.size(1)))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Map token ids (B, T) to capped float32 logits (B, T, V).

        Args:
            attention_mask: (B, cached + T), 0 for padding, on whichever side.
            past_key_values, cache: two names of the same, by the library's version.
            labels: (B, T), shifted here; -100 is ignored.
        """
        if input_ids is None:
            raise ValueError("ArcherChat needs input_ids: its layers look tokens up")
        if self.dtype == torch.float16:
            raise ValueError("ArcherChat overflows in float16: load it in bfloat16 or float32")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache is not False and not self.training:
            cache = DynamicCache()
        slots = torch.arange(input_ids.size(1), device=input_ids.device)
        slots = slots if cache is None else slots + cache.get_seq_length()
        tokens = input_ids
        if attention_mask is not None:
            tokens = torch.where(attention_mask[:, slots] > 0, input_ids, -1)
        if cache is not None:
            tokens = self._remember(cache, tokens, slots)
        if attention_mask is not None:  # a static cache has room for more
            attention_mask = F.pad(attention_mask, (0, tokens.size(1) - attention_mask.size(1)))
        positions = slots[None] if position_ids is None else position_ids
        hidden = self._hidden(input_ids, tokens, attention_mask, positions, cache, slots)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.unembedding(hidden[:, kept])[..., : self.config.vocab_size]
        logits = LOGIT_CAP * torch.tanh(logits.float() / LOGIT_CAP)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **others)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def _remember(self, cache: Cache, tokens: Tensor, slots: Tensor) -> Tensor:
        """Add token ids (B, T), -1 for padding, to those in the cache; return the whole rows."""
        layer = self.config.num_hidden_layers
        if 0 < len(cache.layers) <= layer:
            length = getattr(cache.layers[0], "max_cache_len", None)
            cache.layers.append(StaticLayer(length) if length else DynamicLayer())
        state = tokens[:, None, :, None]
        return cache.update(state, state, layer, {"cache_position": slots})[0][:, 0, :, 0]

    def _hidden(
        self, ids: Tensor, row: Tensor, real: Tensor | None, at: Tensor, cache: Any, slots: Tensor
    ) -> Tensor:
        """Return the unembedding's input (B, T, C) for token ids (B, T).

        Args:
            row: (B, S) ids from the first on, -1 for padding; `slots` (T,) are the given ones'.
            real: the attention mask (B, S); `at`: positions (B, T) or (1, T).
        """
        config, x = self.config, norm(self.token_embedding(ids))
        if config.smear:
            before = F.pad(row, (1, 0), value=-1)[:, slots]
            gate = (
                torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS])) * (before >= 0)[..., None]
            )
            x = x + self.smear_lambda * gate * norm(self.token_embedding(before.clamp(min=0)))
        distance = slots[:, None] - torch.arange(row.size(1), device=x.device)  # (T, S)
        visible = (distance >= 0)[None, None]
        if real is not None:  # padding sees itself, or its softmax would be empty
            visible = visible & (real[:, None, None] > 0) | (distance == 0)
        masks = {window: visible & (distance <= window) for window in set(config.windows)}
        rotary = rotary_tables(at, config.hidden_size // config.num_attention_heads, x.dtype)
        x0, middle = x, x
        for i, block in enumerate(self.blocks):
            if config.residual_lambdas:
                x = self.residual_lambdas[i] * x + self.input_lambdas[i] * x0
            table = self.value_embeddings[str(i)](ids) if config.has_value_embedding(i) else None
            x = block(x, table, rotary, masks[config.windows[i]], cache, slots)
            if i == config.num_hidden_layers // 2:
                middle = x
        return norm(x - self.backout_lambda * middle if config.backout else x)
