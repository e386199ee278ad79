"""From the engine's events to OpenAI's answers, whole or as chunks of a stream.

Both kinds of answer collect choices: `read` takes an event and returns what a chunk shows of it;
`whole` returns the finished choice.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from archerchat.inference.sequence import Event, Request, TokenLogprobs
from archerchat.inference.tools import AnswerReader
from archerchat.serving.worker import Stream
from archerchat.tokenizer.bpe import Tokenizer

FINISH = {"stop": "stop", "max_tokens": "length", "length": "length", "cancelled": "stop"}


class ChatChoice:
    """One sample of an answer.

    Calculator calls are no part of `content`: they are in `parts`, beside the text around them.
    """

    def __init__(self, tokenizer: Tokenizer, index: int, request: Request) -> None:
        self._tokenizer, self._index = tokenizer, index
        self._reader = AnswerReader(tokenizer, request.params.stop)
        self._wants_logprobs = request.params.logprobs is not None
        self._parts: list[dict[str, str]] = []
        self._logprobs: list[dict[str, Any]] = []
        self._finish: str | None = None
        self._started = False

    def read(self, event: Event) -> dict[str, Any]:
        """Take the next event; return the choice of a chunk."""
        pieces = self._reader.read(event.token) if event.token is not None else []
        if event.finish_reason is not None:
            pieces += self._reader.finish()
            self._finish = FINISH[event.finish_reason]
        for piece in pieces:
            if piece.starts or not self._parts:
                self._parts.append({"type": piece.type, "text": ""})
            self._parts[-1]["text"] += piece.text
        text = "".join(piece.text for piece in pieces if piece.type == "text")
        delta: dict[str, Any] = {"content": text}
        if not self._started:
            delta["role"], self._started = "assistant", True
        if any(piece.type != "text" for piece in pieces):
            delta["parts"] = [{"type": piece.type, "text": piece.text} for piece in pieces]
        entries = self._entries(event)
        self._logprobs += entries
        logprobs = {"content": entries} if self._wants_logprobs else None
        return {
            "index": self._index, "delta": delta, "logprobs": logprobs,
            "finish_reason": self._finish,
        }  # fmt: skip

    def whole(self) -> dict[str, Any]:
        """Return the choice of an answer in one."""
        content = "".join(part["text"] for part in self._parts if part["type"] == "text")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if any(part["type"] != "text" for part in self._parts):
            message["parts"] = self._parts
        logprobs = {"content": self._logprobs} if self._wants_logprobs else None
        return {
            "index": self._index, "message": message, "logprobs": logprobs,
            "finish_reason": self._finish,
        }  # fmt: skip

    def _entries(self, event: Event) -> list[dict[str, Any]]:
        if event.logprobs is None or event.token is None:
            return []
        top = [self._entry(*pair) for pair in event.logprobs.top]
        return [self._entry(event.token, event.logprobs.logprob) | {"top_logprobs": top}]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        content = self._tokenizer.token(token)
        text = content.decode(errors="replace")
        return {"token": text, "id": token, "logprob": logprob, "bytes": list(content)}


class TextChoice:
    """One sample that continues a prompt, after the prompt itself where `echo` is given.

    Args:
        echo: the prompt's tokens to show, and their log probabilities.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        index: int,
        request: Request,
        echo: Sequence[tuple[int, TokenLogprobs | None]] = (),
    ) -> None:
        self._tokenizer, self._index = tokenizer, index
        self._wants_logprobs = request.params.logprobs is not None
        self._finish: str | None = None
        self._offset = 0
        self._logprobs: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        self._text = tokenizer.decode(token for token, _ in echo)
        for token, scored in echo:
            self._append(self._logprobs, token, scored)

    def first(self) -> dict[str, Any]:
        """Return the choice of the chunk that echoes the prompt."""
        return self.whole() | {"finish_reason": None}

    def read(self, event: Event) -> dict[str, Any]:
        """Take the next event; return the choice of a chunk."""
        new: dict[str, list[Any]] = {name: [] for name in self._logprobs}
        if event.token is not None and event.logprobs is not None:
            self._append(new, event.token, event.logprobs)
            for name, values in new.items():
                self._logprobs[name] += values
        self._text += event.text
        if event.finish_reason is not None:
            self.end(FINISH[event.finish_reason])
        return self._choice(event.text, new)

    def end(self, reason: str) -> None:
        """Set why it ended."""
        self._finish = reason

    def whole(self) -> dict[str, Any]:
        """Return the choice of an answer in one."""
        return self._choice(self._text, self._logprobs)

    def _choice(self, text: str, logprobs: dict[str, list[Any]]) -> dict[str, Any]:
        shown = logprobs if self._wants_logprobs else None
        return {
            "index": self._index, "text": text, "logprobs": shown, "finish_reason": self._finish
        }  # fmt: skip

    def _append(
        self, logprobs: dict[str, list[Any]], token: int, scored: TokenLogprobs | None
    ) -> None:
        def text_of(token: int) -> str:
            return self._tokenizer.token(token).decode(errors="replace")

        text = text_of(token)
        top: dict[str, float] | None = None
        if scored is not None:
            top = {}
            for other, value in (*scored.top, (token, scored.logprob)):
                top.setdefault(text_of(other), value)  # the likelier of two alike
        logprobs["tokens"].append(text)
        logprobs["token_logprobs"].append(None if scored is None else scored.logprob)
        logprobs["top_logprobs"].append(top)
        logprobs["text_offset"].append(self._offset)
        self._offset += len(text)


class Answer:
    """What all chunks of an answer, or the whole, have around their choices."""

    def __init__(
        self, kind: str, model: str, requests: Sequence[Request], dropped: int = 0
    ) -> None:
        self._kind, self._dropped = kind, dropped
        self._prompt_tokens = sum(len(request.prompt) for request in requests)
        number = uuid.uuid4().hex
        self._common = {"id": f"{kind}-{number}", "created": int(time.time()), "model": model}

    def chunk(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return a chunk of a stream."""
        kind = self._kind.replace("chat.completion", "chat.completion.chunk")
        return {**self._common, "object": kind, "choices": choices, **more}

    def whole(self, choices: Sequence[dict[str, Any]], stream: Stream | None) -> dict[str, Any]:
        """Return an answer in one; without a stream nothing was said."""
        around = {**self._common, "object": self._kind}
        return {**around, "choices": choices, **self.totals(stream)}

    def totals(self, stream: Stream | None) -> dict[str, Any]:
        """Return the tokens and the time that an answer took."""
        completion = stream.tokens if stream else 0
        cached = sum(stream.cached.values()) if stream else 0
        usage = {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if self._dropped:
            usage["dropped_messages"] = self._dropped
        return {"usage": usage, "timings": stream.timings() if stream else None}
