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


class Choice:
    """One sample of an answer; `finish` says why it ended."""

    def __init__(self, tokenizer: Tokenizer, index: int, request: Request) -> None:
        self._tokenizer, self._index, self._request = tokenizer, index, request
        self.finish: str | None = None

    def read(self, event: Event) -> dict[str, Any]:
        """Take the next event; return the choice of a chunk."""
        raise NotImplementedError

    def whole(self) -> dict[str, Any]:
        """Return the choice of an answer in one."""
        raise NotImplementedError

    def _show(self, logprobs: Any, **more: Any) -> dict[str, Any]:
        shown = None if self._request.params.logprobs is None else logprobs
        return {"index": self._index, **more, "logprobs": shown, "finish_reason": self.finish}

    def _text_of(self, token: int) -> str:
        return self._tokenizer.token(token).decode(errors="replace")


class ChatChoice(Choice):
    """A sample of an answer to a conversation.

    Calculator calls are no part of `content`: they are in `parts`, beside the text around them.
    """

    def __init__(self, tokenizer: Tokenizer, index: int, request: Request) -> None:
        super().__init__(tokenizer, index, request)
        self._reader = AnswerReader(tokenizer, request.params.stop)
        self._parts: list[dict[str, str]] = []
        self._entries: list[dict[str, Any]] | None = None

    def read(self, event: Event) -> dict[str, Any]:
        pieces = self._reader.read(event.token) if event.token is not None else []
        if event.finish_reason is not None:
            pieces += self._reader.finish()
            self.finish = FINISH[event.finish_reason]
        for piece in pieces:
            if piece.starts or not self._parts:
                self._parts.append({"type": piece.type, "text": ""})
            self._parts[-1]["text"] += piece.text
        delta: dict[str, Any] = {"role": "assistant"} if self._entries is None else {}
        delta["content"] = "".join(piece.text for piece in pieces if piece.type == "text")
        if any(piece.type != "text" for piece in pieces):
            delta["parts"] = [{"type": piece.type, "text": piece.text} for piece in pieces]
        entries = self._read_logprobs(event)
        self._entries = [*(self._entries or ()), *entries]
        return self._show({"content": entries}, delta=delta)

    def whole(self) -> dict[str, Any]:
        content = "".join(part["text"] for part in self._parts if part["type"] == "text")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if any(part["type"] != "text" for part in self._parts):
            message["parts"] = self._parts
        return self._show({"content": self._entries}, message=message)

    def _read_logprobs(self, event: Event) -> list[dict[str, Any]]:
        if event.logprobs is None or event.token is None:
            return []

        def entry(token: int, logprob: float) -> dict[str, Any]:
            of_bytes = {"bytes": list(self._tokenizer.token(token)), "id": token}
            return {"token": self._text_of(token), "logprob": logprob, **of_bytes}

        top = [entry(*pair) for pair in event.logprobs.top]
        return [entry(event.token, event.logprobs.logprob) | {"top_logprobs": top}]


class TextChoice(Choice):
    """A sample that continues a prompt, after the prompt itself where `echo` is given.

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
        super().__init__(tokenizer, index, request)
        self._offset, self._logprobs = 0, self._score(())
        self._text = tokenizer.decode(token for token, _ in echo)
        self._logprobs = self._score(echo)

    def read(self, event: Event) -> dict[str, Any]:
        scored = event.token is not None and event.logprobs is not None
        new = self._score([(event.token, event.logprobs)] if scored else [])  # type: ignore[list-item]
        for name, values in new.items():
            self._logprobs[name] += values
        self._text += event.text
        self.finish = FINISH[event.finish_reason] if event.finish_reason else None
        return self._show(new, text=event.text)

    def whole(self) -> dict[str, Any]:
        return self._show(self._logprobs, text=self._text)

    def _score(self, tokens: Sequence[tuple[int, TokenLogprobs | None]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        for token, scored in tokens:
            text = self._text_of(token)
            top: dict[str, float] | None = None if scored is None else {}
            if scored is not None and top is not None:
                for other, value in (*scored.top, (token, scored.logprob)):
                    top.setdefault(self._text_of(other), value)  # the likelier of two alike
            found["tokens"].append(text)
            found["token_logprobs"].append(None if scored is None else scored.logprob)
            found["top_logprobs"].append(top)
            found["text_offset"].append(self._offset)
            self._offset += len(text)
        return found


class Answer:
    """What all chunks of an answer, or the whole, have around their choices."""

    def __init__(
        self, kind: str, model: str, requests: Sequence[Request], dropped: int = 0
    ) -> None:
        self._kind, self._dropped = kind, dropped
        self._prompt_tokens = sum(len(request.prompt) for request in requests)
        number = f"{kind}-{uuid.uuid4().hex}"
        self._common = {"id": number, "created": int(time.time()), "model": model}

    def chunk(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return a chunk of a stream."""
        kind = self._kind.replace("chat.completion", "chat.completion.chunk")
        return {**self._common, "object": kind, "choices": choices, **more}

    def whole(self, choices: Sequence[Choice], stream: Stream | None) -> dict[str, Any]:
        """Return an answer in one; without a stream nothing was said."""
        shown = [choice.whole() for choice in choices]
        return {**self._common, "object": self._kind, "choices": shown, **self.totals(stream)}

    def totals(self, stream: Stream | None) -> dict[str, Any]:
        """Return the tokens and the time that an answer took."""
        completion = stream.tokens if stream else 0
        usage = {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(stream.cached.values()) if stream else 0
            },
        }
        if self._dropped:
            usage["dropped_messages"] = self._dropped
        return {"usage": usage, "timings": stream.timings() if stream else None}
