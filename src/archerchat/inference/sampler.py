"""Sample one token for each row of a batch, each by its own parameters and seed.

The uniform number behind a draw is a hash of the row's seed and of the token's position, and of
nothing else. Everything is tensors of fixed shapes, and the host never looks at a value.

Penalties and bias change the logits, also of rows that take the most likely token. A row's top-k
and top-p become a number of tokens to keep, most likely first, lower ids first among equals, and
min-p drops more of them. The draw then walks the distribution in the order of ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from archerchat.inference.sampling_params import MAX_LOGPROBS, SamplingParams

_MASK32 = 0xFFFFFFFF
TABLES = {"bias": torch.float32, "counts": torch.int32, "prompted": torch.bool}
"""What is added to a row's logits, how often it has said each token, which ones its prompt has."""


@dataclass(frozen=True)
class SamplingPlan:
    """What some row of a batch asks for, so that batches without it do not pay for it.

    A row's token is the same under every plan that covers it.
    """

    random: bool = False
    top_k: int = 0
    """The largest, rounded up to a power of two; 0 for none."""
    top_p: bool = False
    min_p: bool = False
    penalties: bool = False
    bias: bool = False
    logprobs: bool = False

    @classmethod
    def covering(cls, rows: Sequence[SamplingParams], masked: bool = False) -> SamplingPlan:
        """Return the least plan for rows with these parameters, and with masks or without."""
        drawn = [each for each in rows if each.temperature > 0]
        largest = max((each.top_k or 0 for each in drawn), default=0)
        return cls(
            random=bool(drawn),
            top_k=1 << (largest - 1).bit_length() if largest else 0,
            top_p=any(each.top_p is not None for each in drawn),
            min_p=any(each.min_p > 0 for each in drawn),
            penalties=any(each.penalties for each in rows),
            bias=masked or any(each.logit_bias for each in rows),
            logprobs=any(each.logprobs is not None for each in rows),
        )


def _mix32(x: Tensor) -> Tensor:
    """Mix values below 2^32 held in int64 (Wellons's lowbias32).

    The second multiplier is taken modulo 2^32 to the negative side: products stay below 2^63.
    """
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK32
    x = (x ^ (x >> 15)) * (0x846CA68B - 2**32) & _MASK32
    return x ^ (x >> 16)


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """Return a float32 in [0, 1) per int64 seed (`derive_seed`) and position below 2^32."""
    mixed = _mix32((seeds & _MASK32) ^ 0x5BD1E995)
    mixed = _mix32(mixed ^ (seeds >> 32))
    mixed = _mix32(mixed ^ positions)
    return (_mix32(mixed ^ 0x27D4EB2F) >> 8).float() * 2.0**-24


class Sampler:
    """Keep the parameters of a batch of at most `rows` rows as tensors, and sample with them.

    Attributes:
        records: (rows, 1 + 2n) float32, for rows that ask for log probabilities: that of the
            last token, those of the n most likely ones, and their ids, which are exact below 2^24.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self._shape, self._device = (rows, vocab_size), device
        self._filters = torch.ones(rows, 3, device=device)  # temperature, top-p, min-p
        self._penalties = torch.ones(rows, 3, device=device)  # repetition, presence, frequency
        self._top_k = torch.zeros(rows, dtype=torch.int64, device=device)
        self._seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self.records = torch.zeros(rows, 1 + 2 * min(MAX_LOGPROBS, vocab_size), device=device)
        # `TABLES` (rows, vocab_size), 9 bytes an entry in all. Few requests need them, so a table
        # is made for the first that does, before its step is captured: graphs keep its address.
        self._tables: dict[str, Tensor] = {}

    def _table(self, name: str) -> Tensor:
        if name not in self._tables:
            dtype, device = TABLES[name], self._device
            self._tables[name] = torch.zeros(self._shape, dtype=dtype, device=device)
        return self._tables[name]

    def assign(self, row: int, params: SamplingParams, seed: int, prompt: Sequence[int]) -> None:
        """Give a row its parameters; `seed` is the sample's own."""
        filters = params.temperature, params.top_p or 1.0, params.min_p
        self._filters[row] = self._to_device(filters, torch.float32)
        self._penalties[row] = self._to_device(params.penalties or (1, 0, 0), torch.float32)
        self._top_k[row] = params.top_k or 0
        self._seeds[row] = seed
        if params.penalties:
            self._table("counts")[row] = 0
            ids = self._to_device(prompt, torch.int64)
            self._table("prompted")[row].zero_().index_fill_(0, ids, True)
        if params.logit_bias or "bias" in self._tables:
            self._set_bias(row, params)

    def _set_bias(self, row: int, params: SamplingParams) -> Tensor:
        bias = self._table("bias")[row].zero_()
        if params.logit_bias:
            values = self._to_device(params.logit_bias.values(), torch.float32)
            bias.index_copy_(0, self._to_device(params.logit_bias, torch.int64), values)
        return bias

    def allow(self, row: int, params: SamplingParams, token_ids: Sequence[int]) -> None:
        """Let a row's next token be one of these alone, under a plan that has a bias."""
        bias, allowed = self._set_bias(row, params), self._to_device(token_ids, torch.int64)
        values = bias[allowed]
        bias.fill_(-torch.inf).index_copy_(0, allowed, values)

    def move(self, source: int, target: int) -> None:
        """Copy everything of a row to another row."""
        rules = self._filters, self._penalties, self._top_k, self._seeds
        for tensor in (*rules, *self._tables.values()):
            tensor[target] = tensor[source]

    def state(self, rows: int) -> list[Tensor]:
        """Return views of what sampling changes of the first `rows` rows, besides records."""
        return [self._tables["counts"][:rows]] if "counts" in self._tables else []

    def sample(
        self,
        logits: Tensor,
        positions: Tensor,
        plan: SamplingPlan,
        first: int = 0,
        said: Tensor | None = None,
    ) -> Tensor:
        """Sample the tokens (B,) of rows `first` .. `first` + B - 1.

        Args:
            logits: (B, vocab_size) float32.
            positions: (B,) that the tokens will take in their rows.
            plan: covers these rows' parameters.
            said: (B,), the tokens before them, which penalties count; None after prompts.
        """
        rows = slice(first, first + logits.size(0))
        adjusted = self._adjust(logits, rows, plan, said)
        token = adjusted.argmax(dim=-1)
        if plan.random:
            drawn = self._draw(adjusted, positions, rows, plan)
            token = torch.where(self._filters[rows, 0] > 0, drawn, token)
        if plan.logprobs:
            logprobs = logits.log_softmax(dim=-1)
            top = logprobs.topk((self.records.size(1) - 1) // 2)
            chosen = logprobs.gather(1, token[:, None])
            self.records[rows] = torch.cat([chosen, top.values, top.indices.float()], dim=1)
        return token

    def _adjust(
        self, logits: Tensor, rows: slice, plan: SamplingPlan, said: Tensor | None
    ) -> Tensor:
        """Apply penalties and bias; rows without them keep their logits bit for bit."""
        if plan.penalties:
            counts = self._table("counts")[rows]
            if said is not None:
                once = torch.ones_like(said, dtype=torch.int32)
                counts.scatter_add_(1, said[:, None], once[:, None])
            factor, presence, frequency = self._penalties[rows, :, None].unbind(1)
            repeated = torch.where(logits > 0, logits / factor, logits * factor)
            known = (counts > 0) | self._table("prompted")[rows]
            logits = torch.where(known, repeated, logits)
            logits = logits - frequency * counts - presence * (counts > 0)
        if plan.bias:
            logits = logits + self._table("bias")[rows]
        return logits

    def _draw(self, logits: Tensor, positions: Tensor, rows: slice, plan: SamplingPlan) -> Tensor:
        temperature, top_p, min_p = self._filters[rows].unbind(1)
        scaled = logits / torch.where(temperature > 0, temperature, 1.0)[:, None]
        weights = relative = (scaled - scaled.amax(dim=-1, keepdim=True)).exp()
        if plan.top_k or plan.top_p:
            weights = weights * _kept(scaled, self._top_k[rows], top_p, plan)
        if plan.min_p:
            weights = weights * (relative >= min_p[:, None])
        cumulative = weights.cumsum(dim=-1)
        total = cumulative[:, -1]
        # Strictly below the total, whatever the rounding: some token's share always lies above.
        aim = (uniforms(self._seeds[rows], positions) * total).minimum(total * (1 - 2.0**-23))
        ids = torch.arange(logits.size(-1), device=logits.device)
        above = (cumulative > aim[:, None]) & (weights > 0)
        return torch.where(above, ids, logits.size(-1) - 1).amin(dim=-1)

    def _to_device(self, values: Iterable[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(values), dtype=dtype).to(self._device, non_blocking=True)


def _kept(scaled: Tensor, top_k: Tensor, top_p: Tensor, plan: SamplingPlan) -> Tensor:
    """Return which tokens (B, V) pass their row's filters, top-k first, then top-p of the rest."""
    vocab_size = scaled.size(-1)
    most = vocab_size if plan.top_p else min(plan.top_k, vocab_size)
    # The most likely first; order among equals does not matter here.
    sizes = scaled.topk(most, dim=-1).values
    count = torch.where(top_k > 0, top_k.clamp(max=vocab_size), vocab_size)
    if plan.top_p:
        ranked = (sizes - sizes[:, :1]).exp()
        ranked = ranked * (torch.arange(most, device=scaled.device) < count[:, None])
        before = ranked.cumsum(dim=-1) - ranked
        # A token stays while those before it have less than p of what the first filter left.
        enough = (before < top_p[:, None] * ranked.sum(dim=-1, keepdim=True)).sum(dim=-1)
        count = torch.where(top_p < 1, enough.clamp(min=1).minimum(count), count)
    least = sizes.gather(1, (count.clamp(max=most) - 1)[:, None])
    equal = scaled == least
    room = count[:, None] - (scaled > least).sum(dim=-1, keepdim=True)
    kept = (scaled > least) | (equal & (equal.cumsum(dim=-1) <= room))
    return kept | (count >= vocab_size)[:, None]
