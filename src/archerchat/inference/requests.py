"""What an engine is asked for and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from archerchat.errors import UsageError

FinishReason = Literal["stop", "max_tokens", "length", "cancelled"]
"""A stop token; as many tokens as asked for; the context is full; taken back."""


class RowHook(Protocol):
    """Watch one row's tokens and say what must come next: a tool's answer, for example."""

    def __call__(self, token: int) -> Sequence[int]:
        """Take the next token that the model chose; return tokens to force after it.

        Forced tokens are not shown to the hook.
        """
        ...


@dataclass(frozen=True)
class Request:
    """A prompt to continue, and how.

    Raises:
        UsageError: a number makes no sense; the message names it.
    """

    prompt: Sequence[int]
    """Token ids, at least one; usually BOS comes first."""
    max_new_tokens: int
    temperature: float = 1.0
    """0 takes the most likely token each time."""
    top_k: int | None = None
    """Draw from so many of the most likely tokens only."""
    top_p: float | None = None
    """Then from the fewest that have this share of what is left."""
    seed: int = 0
    stop_tokens: Collection[int] = ()
    """Token ids that end a row; they are not part of what it says."""
    num_samples: int = 1
    """Rows that continue the prompt, each with draws of its own."""
    hook: Callable[[], RowHook] | None = None
    """Makes each row's hook."""

    def __post_init__(self) -> None:
        if len(self.prompt) == 0:
            raise UsageError(
                "the prompt is empty; a model needs one token to continue, such as BOS"
            )
        for name in ("max_new_tokens", "num_samples", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        if not (self.temperature == 0 or 1e-3 <= self.temperature <= 100):  # NaN too
            raise UsageError(f"temperature is {self.temperature}; it must be 0, or 0.001 to 100")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}; it must be from 0 to 2**63 - 1")


@dataclass(frozen=True)
class Event:
    """What happened to a row: a token, its end, or both."""

    request: int
    """The request's number, as it was given."""
    sample: int
    token: int | None
    """None where a stop token or a cancellation ended the row."""
    forced: bool = False
    """A hook's token, not the model's: mask 0."""
    finish_reason: FinishReason | None = None
    """Set in a row's last event."""
    stop_token: int | None = None
    """The stop token that ended the row."""

    @property
    def mask(self) -> int:
        """1 for a token that the model chose, else 0."""
        return int(self.token is not None and not self.forced)


@dataclass
class Completion:
    """What one row said."""

    token_ids: list[int] = field(default_factory=list)
    """Without the prompt and without the stop token."""
    mask: list[int] = field(default_factory=list)
    """1 for tokens that the model chose, 0 for forced ones."""
    finish_reason: FinishReason | None = None
    stop_token: int | None = None

    def add(self, event: Event) -> None:
        """Take in the row's next event."""
        if event.token is not None:
            self.token_ids.append(event.token)
            self.mask.append(event.mask)
        self.finish_reason, self.stop_token = event.finish_reason, event.stop_token


def check_request(request: Request, vocab_size: int, max_length: int) -> None:
    """Refuse what an engine cannot serve.

    Raises:
        UsageError: the prompt has unknown tokens or leaves no room in the context.
    """
    longest = max_length - 1
    if len(request.prompt) > longest:
        raise UsageError(
            f"the prompt has {len(request.prompt)} tokens and the context {max_length}: cut it to "
            f"{longest} or fewer, to leave room for an answer"
        )
    low, high = min(request.prompt), max(request.prompt)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise UsageError(f"the prompt has token {wrong}; the model knows 0 to {vocab_size - 1}")
