"""How tokens are sampled: one class and one set of limits for everything that generates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from archerchat.config import Config, Limit, PositiveFloat, PositiveInt, Seed, Share
from archerchat.errors import UsageError

MIN_TEMPERATURE = 0.001
MAX_LOGPROBS = 20
Penalty = Annotated[float, Limit(-2, 2)]
_BIAS = Limit(-100, 100)
_MASK64 = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class SamplingParams(Config):
    """Sampling options, applied as: penalties, bias, temperature, top-k, top-p, min-p."""

    max_new_tokens: PositiveInt = 256
    """Most tokens to generate per sample."""
    temperature: Annotated[float, Limit(0, 100)] = 1.0
    """Sampling temperature: 0 always takes the most likely token, larger values vary more."""
    top_k: PositiveInt | None = None
    """Sample from this many of the most likely tokens only; `none` samples from all."""
    top_p: Share | None = None
    """Sample from the fewest most likely tokens whose share of what top-k left reaches this."""
    min_p: Annotated[float, Limit(0, 1)] = 0.0
    """Leave out tokens less likely than this share of the most likely token's probability."""
    repetition_penalty: PositiveFloat = 1.0
    """Divide positive logits of tokens in the prompt or the answer by this, multiply negative ones
    (arXiv:1909.05858). Above 1 repeats less."""
    presence_penalty: Penalty = 0.0
    """Subtract this from the logits of tokens that the answer has. Above 0 repeats less."""
    frequency_penalty: Penalty = 0.0
    """Subtract this from a token's logit once per time that the answer has it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Values, -100 to 100, to add to the logits of token ids."""
    stop: tuple[str, ...] = ()
    """Strings that end a sample; they are not part of its text."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids of tokens that end a sample; they are not part of what it says."""
    logprobs: Annotated[int, Limit(0, MAX_LOGPROBS)] | None = None
    """Return each token's log probability, and those of this many of the most likely tokens. They
    are the model's own, before penalties, bias, temperature and filters."""
    seed: Seed = 42
    """Random seed for sampling."""
    num_samples: PositiveInt = 1
    """Samples per prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise UsageError(
                f"--temperature is {self.temperature}; it must be 0, or at least {MIN_TEMPERATURE}"
            )
        for token, bias in self.logit_bias.items():
            if not _BIAS.accepts(bias):
                raise UsageError(f"--logit-bias of token {token} is {bias}; it must be {_BIAS}")
        if "" in self.stop:
            raise UsageError("--stop has an empty string, which would end every sample at once")

    @property
    def penalties(self) -> tuple[float, float, float] | None:
        """Repetition, presence and frequency; None if they have no effect."""
        found = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return found if found != (1, 0, 0) else None

    def refuse_changes(self, *names: str) -> None:
        """Refuse values of fields that a command has no use for, by `UsageError`."""
        for name in names:
            value = getattr(self, name)
            if value != getattr(SamplingParams(), name):
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} {value} has no use here: leave --{flag} out")


def derive_seed(seed: int, index: int) -> int:
    """Return a seed, 0 .. 2^63 - 1, that is unrelated for each pair of seed and index."""
    return _mix64(_mix64(seed & _MASK64) + index) >> 1


def _mix64(x: int) -> int:
    """Finalise as in SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK64
    return x ^ x >> 31
