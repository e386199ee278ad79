"""Sample one token for each row of a batch, each by its own parameters and seed.

The uniform number behind a draw is a hash of the row's seed and of the position that the token
takes, and of nothing else: neither the rows around it nor the order in which rows were served
matter. Everything is tensors of fixed shapes, and the host never looks at a value.

A row's filters become a number of tokens to keep, most likely first, lower ids first among equals.
The draw then walks the distribution in the order of ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from archerchat.inference.sampling_params import SamplingParams

_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class SamplingPlan:
    """What some row of a batch asks for, so that batches without it do not pay for it.

    A row's token is the same under every plan that covers it.
    """

    random: bool = False
    """A temperature above 0."""
    top_k: int = 0
    """The largest, rounded up to a power of two; 0 for none."""
    top_p: bool = False

    @classmethod
    def covering(cls, params: Iterable[SamplingParams]) -> SamplingPlan:
        """Return the least plan for rows with these parameters."""
        drawn = [each for each in params if each.temperature > 0]
        largest = max((each.top_k or 0 for each in drawn), default=0)
        return cls(
            random=bool(drawn),
            top_k=1 << (largest - 1).bit_length() if largest else 0,
            top_p=any(each.top_p is not None for each in drawn),
        )


def _mix32(x: Tensor) -> Tensor:
    """Mix values below 2^32 held in int64 (Wellons's lowbias32).

    The second multiplier is taken modulo 2^32 to the negative side: products stay below 2^63.
    """
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK32
    x = (x ^ (x >> 15)) * (0x846CA68B - 2**32) & _MASK32
    return x ^ (x >> 16)


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """Return one float32 in [0, 1), a multiple of 2^-24, for each seed and position.

    Args:
        seeds: int64, from `derive_seed`.
        positions: int64, below 2^32.
    """
    mixed = _mix32((seeds & _MASK32) ^ 0x5BD1E995)
    mixed = _mix32(mixed ^ (seeds >> 32))
    mixed = _mix32(mixed ^ positions)
    return (_mix32(mixed ^ 0x27D4EB2F) >> 8).float() * 2.0**-24


class Sampler:
    """Keep the parameters of a batch's rows as tensors, and sample with them.

    Args:
        rows: most rows of a batch.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.temperatures = torch.zeros(rows, device=device)
        self.top_k = torch.zeros(rows, dtype=torch.int64, device=device)  # 0 for none
        self.top_p = torch.ones(rows, device=device)
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=device)

    def assign(self, row: int, params: SamplingParams, seed: int) -> None:
        """Give a row its parameters; `seed` is the sample's own."""
        self.temperatures[row] = params.temperature
        self.top_k[row] = params.top_k or 0
        self.top_p[row] = 1.0 if params.top_p is None else params.top_p
        self.seeds[row] = seed

    def move(self, source: int, target: int) -> None:
        """Copy a row's parameters to another row."""
        for tensor in (self.temperatures, self.top_k, self.top_p, self.seeds):
            tensor[target] = tensor[source]

    def sample(
        self, logits: Tensor, positions: Tensor, plan: SamplingPlan, first: int = 0
    ) -> Tensor:
        """Sample the tokens (B,) of rows `first` .. `first` + B - 1.

        Args:
            logits: (B, vocab_size) float32.
            positions: (B,) that the tokens will take in their rows.
            plan: covers these rows' parameters.
        """
        best = logits.argmax(dim=-1)
        if not plan.random:
            return best
        rows = slice(first, first + logits.size(0))
        temperatures = self.temperatures[rows]
        scaled = logits / torch.where(temperatures > 0, temperatures, 1.0)[:, None]
        weights = (scaled - scaled.amax(dim=-1, keepdim=True)).exp()
        if plan.top_k or plan.top_p:
            weights = weights * _kept(scaled, self.top_k[rows], self.top_p[rows], plan)
        cumulative = weights.cumsum(dim=-1)
        total = cumulative[:, -1]
        # Strictly below the total, whatever the rounding: some token's share always lies above.
        aim = (uniforms(self.seeds[rows], positions) * total).minimum(total * (1 - 2.0**-23))
        ids = torch.arange(logits.size(-1), device=logits.device)
        above = (cumulative > aim[:, None]) & (weights > 0)
        token = torch.where(above, ids, logits.size(-1) - 1).amin(dim=-1)
        return torch.where(temperatures > 0, token, best)


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
