"""How tokens are sampled: one class and one set of limits for everything that generates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from archerchat.config import Config, Limit, PositiveInt, Seed, Share
from archerchat.errors import UsageError

MIN_TEMPERATURE = 0.001
_MASK64 = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class SamplingParams(Config):
    """Sampling options.

    Raises:
        UsageError: a field is outside its limit; the message names it as a flag.
    """

    max_new_tokens: PositiveInt = 256
    """Most tokens to generate per sample."""
    temperature: Annotated[float, Limit(0, 100)] = 1.0
    """Sampling temperature: 0 always takes the most likely token, larger values vary more."""
    top_k: PositiveInt | None = None
    """Sample from this many of the most likely tokens only; None samples from all."""
    top_p: Share | None = None
    """Then sample from the fewest most likely tokens whose share of the rest reaches this."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids of tokens that end a sample; they are not part of what it says."""
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

    def refuse_changes(self, *names: str) -> None:
        """Refuse fields that a command has no use for, unless they have their defaults.

        Raises:
            UsageError: one has another value; the message names its flag.
        """
        for name in names:
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
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
