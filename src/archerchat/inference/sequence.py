"""What an engine is asked for, what it answers, and a sequence while it runs."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from typing import Literal, Protocol

from archerchat.errors import UsageError
from archerchat.inference.sampling_params import SamplingParams, derive_seed

FinishReason = Literal["stop", "max_tokens", "length", "cancelled"]
"""A stop token; the limit of new tokens; the end of the context; cancelled by the caller."""


class SequenceHook(Protocol):
    """Watch the tokens of one sequence and force what comes next, such as a tool's result."""

    def __call__(self, token: int) -> abc.Sequence[int]:
        """Take the next token that the model chose; return tokens to force after it.

        Forced tokens are not shown to the hook.
        """
        ...


@dataclass(frozen=True)
class Request:
    """A prompt to continue, and how.

    Raises:
        UsageError: the prompt is empty.
    """

    prompt: abc.Sequence[int]
    """Token ids, at least one; usually BOS comes first."""
    params: SamplingParams = field(default_factory=SamplingParams)
    hook: abc.Callable[[], SequenceHook] | None = None
    """Builds a hook for each sample."""

    def __post_init__(self) -> None:
        if len(self.prompt) == 0:
            raise UsageError(
                "the prompt is empty; a model needs one token to continue, such as BOS"
            )


@dataclass(frozen=True)
class Event:
    """What happened to a sequence: a token, its end, or both."""

    request: int
    """The number that the request was added with."""
    sample: int
    token: int | None
    """None if a stop token or a cancellation ended the sequence."""
    forced: bool = False
    """Whether a hook chose the token instead of the model."""
    finish_reason: FinishReason | None = None
    """Set in the last event of a sequence."""
    stop_token: int | None = None
    """The stop token that ended the sequence."""

    @property
    def mask(self) -> int:
        """1 for a token that the model chose, else 0."""
        return int(self.token is not None and not self.forced)


@dataclass
class Completion:
    """What one sequence said."""

    token_ids: list[int] = field(default_factory=list)
    """Without the prompt and without the stop token."""
    mask: list[int] = field(default_factory=list)
    """1 for tokens that the model chose, 0 for forced ones."""
    finish_reason: FinishReason | None = None
    stop_token: int | None = None

    def add(self, event: Event) -> None:
        """Append the sequence's next event."""
        if event.token is not None:
            self.token_ids.append(event.token)
            self.mask.append(event.mask)
        self.finish_reason, self.stop_token = event.finish_reason, event.stop_token


class Sequence:
    """A sample that has a row in the batch.

    Args:
        number: the request's.
        sample: which of the request's samples.
        max_length: tokens that the row has room for, prompt included.

    Attributes:
        seed: of this sample's draws.
        token_ids: what it has said, as far as the host has read it.
        num_drawn: tokens drawn for it, read or not.
        finished: whether its last event has happened.
    """

    def __init__(self, number: int, sample: int, request: Request, max_length: int) -> None:
        params, room = request.params, max_length - len(request.prompt)
        self.number, self.sample, self.request = number, sample, request
        self.seed = derive_seed(params.seed, sample)
        self.token_ids: list[int] = []
        self.num_drawn = 1
        self.finished = False
        self._hook = request.hook() if request.hook else None
        self._forced: dict[int, int] = {}  # tokens that replace drawn ones, by index
        self._max_tokens = min(params.max_new_tokens, room)
        within = params.max_new_tokens <= room
        self._limit_reason: FinishReason = "max_tokens" if within else "length"

    @property
    def num_cached(self) -> int:
        """Tokens that the cache keeps of it: all but the one drawn last."""
        return len(self.request.prompt) + self.num_drawn - 1

    @property
    def needs_step(self) -> bool:
        """Whether another token must be drawn."""
        return not self.finished and self.num_drawn < self._max_tokens

    @property
    def forced_input(self) -> int | None:
        """The token that replaces the one drawn last, or None."""
        return self._forced.get(self.num_drawn - 1)

    def read(self, drawn: int) -> Event:
        """Take the next drawn token: what the sequence says, what must follow, whether it ends."""
        index = len(self.token_ids)
        forced = index in self._forced
        token = self._forced.get(index, drawn)
        if token in self.request.params.stop_token_ids:
            self.finished = True
            return Event(self.number, self.sample, None, forced, "stop", stop_token=token)
        self.token_ids.append(token)
        self.finished = index == self._max_tokens - 1
        if self._hook is not None and not forced and not self.finished:
            self._forced.update(enumerate(self._hook(token), start=index + 1))
        reason = self._limit_reason if self.finished else None
        return Event(self.number, self.sample, token, forced, reason)

    def cancel(self) -> Event:
        """End it here."""
        self.finished = True
        return Event(self.number, self.sample, None, finish_reason="cancelled")


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
