"""What an engine is asked for, what it answers, and a sequence while it runs."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from typing import Literal

from archerchat.errors import UsageError
from archerchat.inference.sampling_params import SamplingParams, derive_seed

FinishReason = Literal["stop", "max_tokens", "length", "cancelled"]
"""A stop token or string; the limit of new tokens; the end of the context; a call of `cancel`."""
Decode = abc.Callable[[list[int]], str]
"""From token ids to text; bytes that are no whole character become U+FFFD."""

SequenceHook = abc.Callable[[int], abc.Sequence[int]]
"""Takes each token that the model chose in one sequence; returns tokens to force after it, such as
a tool's result, which are not shown to the hook."""
TokenMask = abc.Callable[[abc.Sequence[int]], abc.Sequence[int]]
"""Takes what one sequence has said so far; returns the tokens that may come next, at least one.
Calls of a sequence come in order, so a mask may keep a state."""
MAX_PENDING = 4
"""Most tokens of an unfinished character, one byte each."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue, and how."""

    prompt: abc.Sequence[int]
    """Token ids, at least one; usually BOS comes first."""
    params: SamplingParams = field(default_factory=SamplingParams)
    hook: abc.Callable[[], SequenceHook] | None = None
    """Builds a hook for each sample."""
    decode: Decode | None = None
    """With it, events and completions have text. Stop strings need it."""
    mask: abc.Callable[[], TokenMask] | None = None
    """Builds a mask for each sample, such as that of a grammar."""

    def __post_init__(self) -> None:
        assert not self.params.stop or self.decode is not None, "stop strings need `decode`"
        if len(self.prompt) == 0:
            raise UsageError("the prompt is empty: give the model a token to continue, such as BOS")


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities of one position, as the model itself gives them."""

    logprob: float
    """That of the token that was sampled."""
    top: tuple[tuple[int, float], ...]
    """The most likely tokens and theirs, as many as `SamplingParams.logprobs` asks for."""


@dataclass(frozen=True)
class Event:
    """What happened to a sequence: a token, its end, or both."""

    request: int
    """The request's number: that of `Engine.add`, or its place in the list."""
    sample: int
    token: int | None
    """None if a stop token or a cancellation ended the sequence."""
    forced: bool = False
    """Whether a hook chose the token instead of the model."""
    finish_reason: FinishReason | None = None
    """Set in the last event of a sequence."""
    stop_token: int | None = None
    """The token that ended the sequence, if one did."""
    text: str = ""
    """What has become certain since the last event; it may lag behind the tokens."""
    logprobs: TokenLogprobs | None = None
    """Log probabilities of the token or the stop token; None for forced tokens."""
    cached: int = 0
    """Tokens of the prompt that an earlier request has run."""
    first: bool = False
    """Whether this is the sequence's first event."""


@dataclass
class Completion:
    """What one sequence said."""

    token_ids: list[int] = field(default_factory=list)
    """Without the prompt and without the stop token."""
    mask: list[int] = field(default_factory=list)
    """1 for tokens that the model chose, 0 for forced ones."""
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    text: str = ""
    """Without the stop string, whose tokens `token_ids` has."""
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    """One per token, None for forced ones; empty unless asked for."""

    def add(self, event: Event) -> None:
        """Append the sequence's next event."""
        if event.token is not None:
            self.token_ids.append(event.token)
            self.mask.append(int(not event.forced))
            if event.logprobs is not None or self.logprobs:
                self.logprobs.append(event.logprobs)
        self.text += event.text
        self.finish_reason, self.stop_token = event.finish_reason, event.stop_token


class Detokenizer:
    """Turn tokens into text in whole characters, up to a stop string.

    Text that may still become a stop string is held back. Of several stop strings, the one that is
    complete first counts, and `stopped` is then true.
    """

    def __init__(self, decode: Decode, stops: abc.Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, stops
        self._pending: list[int] = []  # tokens of an unfinished character
        self._held = ""  # text that may become a stop string
        self.stopped = False

    def read(self, token: int) -> str:
        """Take the next token; return the text that is certain now."""
        if self.stopped:
            return ""
        self._pending.append(token)
        text = self._decode(self._pending)
        if text.endswith("\ufffd") and len(self._pending) < MAX_PENDING:
            return ""
        self._pending = []
        return self._until_stop(self._held + text)

    def finish(self) -> str:
        """Return the text that was held back."""
        text = self._held + self._decode(self._pending)
        self._pending, self._held = [], ""
        return text

    def _until_stop(self, text: str) -> str:
        places = [(text.find(stop), stop) for stop in self._stops]
        if found := [(start + len(stop), start) for start, stop in places if start >= 0]:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        starts = (n for stop in self._stops for n in range(len(stop)) if text.endswith(stop[:n]))
        certain = len(text) - max(starts, default=0)
        self._held = text[certain:]
        return text[:certain]


class Sequence:
    """A sample that has a row in the batch, which has room for `max_length` tokens."""

    def __init__(
        self, number: int, sample: int, request: Request, max_length: int, cached: int = 0
    ) -> None:
        params = request.params
        self.number, self.sample, self.request, self._cached = number, sample, request, cached
        self.seed = derive_seed(params.seed, sample)
        self.token_ids: list[int] = []  # what it has said, as far as the host has read it
        self.num_drawn = 1  # tokens, read or not
        self.finished = False  # whether its last event has happened
        self._hook = request.hook() if request.hook else None
        self.mask = request.mask() if request.mask else None
        self._text = Detokenizer(request.decode, params.stop) if request.decode else None
        self._forced: dict[int, int] = {}  # tokens that replace drawn ones, by index
        self._max_tokens = min(params.max_new_tokens, max_length - len(request.prompt))

    @property
    def num_cached(self) -> int:
        """Tokens that the cache keeps of it: all but the one drawn last."""
        return len(self.request.prompt) + self.num_drawn - 1

    @property
    def needs_step(self) -> bool:
        return not self.finished and self.num_drawn < self._max_tokens

    @property
    def forced_input(self) -> int | None:
        """The token that replaces the one drawn last, or None."""
        return self._forced.get(self.num_drawn - 1)

    def read(self, sampled: int, record: abc.Sequence[float] = ()) -> Event:
        """Take the next sampled token; decide what the sequence says and whether it ends.

        Args:
            record: the token's row of `Sampler.records`, if the request asks for logprobs.
        """
        index, params = len(self.token_ids), self.request.params
        forced = index in self._forced
        token = self._forced.get(index, sampled)
        logprobs = None
        if params.logprobs is not None and not forced:
            count = len(record) // 2
            top = zip(map(int, record[1 + count :]), record[1 : 1 + count], strict=True)
            logprobs = TokenLogprobs(record[0], tuple(top)[: params.logprobs])
        stopped, text = token in params.stop_token_ids, ""
        if not stopped:
            self.token_ids.append(token)
            text = self._text.read(token) if self._text else ""
        reason: FinishReason | None = None
        if stopped or (self._text and self._text.stopped):
            reason = "stop"
        elif index == self._max_tokens - 1:
            reason = "max_tokens" if self._max_tokens == params.max_new_tokens else "length"
        if reason is not None:
            text += self._end()
        elif self._hook is not None and not forced:
            self._forced.update(enumerate(self._hook(token), start=index + 1))
        return Event(
            self.number,
            self.sample,
            token=None if stopped else token,
            forced=forced,
            finish_reason=reason,
            stop_token=token if stopped else None,
            text=text,
            logprobs=logprobs,
            cached=self._cached,
            first=index == 0,
        )

    def cancel(self) -> Event:
        """End it here."""
        text = self._end()
        return Event(self.number, self.sample, None, finish_reason="cancelled", text=text)

    def _end(self) -> str:
        self.finished = True
        return self._text.finish() if self._text else ""
