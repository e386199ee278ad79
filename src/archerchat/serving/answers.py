"""From the engine's events to the answers of three APIs, whole or as the events of a stream."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from archerchat.inference.sequence import Event
from archerchat.inference.tools import AnswerReader, read_parts
from archerchat.serving.guard import APIError, AsciiJSON, to_json
from archerchat.serving.models import ServedModel
from archerchat.serving.requests import Sampled
from archerchat.serving.worker import Stream
from archerchat.tasks.conversation import text_of

FINISH = {"stop": "stop", "max_tokens": "length", "length": "length", "cancelled": "stop"}
PING = b": still at work\n\n"
"""What a silent stream sends, to keep proxies awake."""


class Answer(StreamingResponse):
    """Continue texts, whole or as a stream. Whatever ends the response frees its rows."""

    kind = "text_completion"

    def __init__(self, model: ServedModel, stream: Stream, body: Sampled, dropped: int = 0) -> None:
        self._usage = {"dropped_messages": dropped} if dropped else {}
        self._own_headers = {"archerchat-dropped-messages": str(dropped)} if dropped else {}
        headers = {"cache-control": "no-store", **self._own_headers}
        super().__init__(self._frames(), headers=headers, media_type="text/event-stream")
        self._model, self._stream, self._body = model, stream, body
        self._params = stream.requests[0].params
        self._offsets = [0] * stream.num_samples  # of the next token, in the text of each sample
        self._common = {"id": _new_id(f"{self.kind}-"), "created": int(time.time())}
        self._common |= {"model": model.name}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # From 2.4 on, Starlette notices that the client left only when a send fails.
        scope = {**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.worker.close(self._stream)

    async def stream_response(self, send: Send) -> None:
        if self._body.stream:
            return await super().stream_response(send)
        async for _ in self._stream.arriving():
            pass
        whole = AsciiJSON(self.whole(), headers=self._own_headers)
        start = {"type": "http.response.start", "status": 200, "headers": whole.raw_headers}
        await send(start)
        await send({"type": "http.response.body", "body": whole.body})

    async def _frames(self) -> AsyncIterator[bytes]:
        try:
            async for shown in self.shown():
                yield b"".join(map(_frame, shown)) or PING
        except APIError as error:
            yield _frame(self.failure(error))

    async def shown(self) -> AsyncIterator[list[Any]]:
        """Yield the events of a stream: in one list what came at one time, perhaps nothing."""
        async for found in self._stream.arriving():
            chunks: list[Any] = [self._chunk([self.next_choice(*each)]) for each in found.items()]
            if not self._stream.open_samples:
                chunks[-1]["timings"] = self._stream.timings()
                options = self._body.stream_options
                if options and options.include_usage:
                    chunks.append(self._chunk([]) | self._totals())
                chunks.append("[DONE]")
            yield chunks

    def failure(self, error: APIError) -> dict[str, Any]:
        """Return the event that ends a stream if the model fails."""
        return error.content()

    def whole(self) -> dict[str, Any]:
        """Return the answer in one."""
        choices = [self.whole_choice(*each) for each in enumerate(self._stream.said)]
        return {**self._common, "object": self.kind, "choices": choices, **self._totals()}

    def next_choice(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        """Return what a chunk says of a sample's next events."""
        return self._choice(index, events, text="".join(event.text for event in events))

    def whole_choice(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        """Return what the whole answer says of a sample's events."""
        return self.next_choice(index, events)

    def _choice(self, index: int, events: Sequence[Event], **said: Any) -> dict[str, Any]:
        reason = events[-1].finish_reason
        logprobs = self._score(index, events) if self._params.logprobs is not None else None
        finish = reason and FINISH[reason]
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}

    def _score(self, index: int, events: Sequence[Event]) -> dict[str, list[Any]]:
        """Return the log probabilities of events, in the API's form."""
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        found: dict[str, list[Any]] = {name: [] for name in names}
        for token, scored in ((e.token, e.logprobs) for e in events if e.token is not None):
            text = self._text_of(token)
            top: dict[str, float] = {}
            for other, value in (*scored.top, (token, scored.logprob)) if scored else ():
                top.setdefault(self._text_of(other), value)  # the likelier of two alike
            found["tokens"].append(text)
            found["token_logprobs"].append(scored.logprob if scored else None)
            found["top_logprobs"].append(top if scored else None)
            found["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(text)
        return found

    def _text_of(self, token: int) -> str:
        return self._model.tokenizer.token(token).decode(errors="replace")

    def _chunk(self, choices: list[Any]) -> dict[str, Any]:
        kind = self.kind.replace("chat.completion", "chat.completion.chunk")
        return {**self._common, "object": kind, "choices": choices}

    def _totals(self) -> dict[str, Any]:
        """Return the tokens and the time that the answer took."""
        stream = self._stream
        usage = {
            "prompt_tokens": stream.prompt_tokens,
            "completion_tokens": stream.tokens,
            "total_tokens": stream.prompt_tokens + stream.tokens,
            "prompt_tokens_details": {"cached_tokens": stream.cached},
            **self._usage,
        }
        return {"usage": usage, "timings": stream.timings()}


class ChatAnswer(Answer):
    """Answer a conversation.

    Calculator calls are no part of `content`: they are in `parts`, beside the text around them.
    """

    kind = "chat.completion"

    @cached_property
    def _readers(self) -> list[AnswerReader]:
        return [AnswerReader(self._model.tokenizer, self._params.stop) for _ in self._stream.said]

    def next_choice(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        reader, is_first = self._readers[index], len(events) == len(self._stream.said[index])
        pieces = [p for e in events if e.token is not None for p in reader.read(e.token)]
        if events[-1].finish_reason is not None:
            pieces += reader.finish()
        delta: dict[str, Any] = {"role": "assistant"} if is_first else {}
        delta |= _content([asdict(piece) for piece in pieces])
        return self._choice(index, events, delta=delta)

    def whole_choice(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        token_ids = [event.token for event in events if event.token is not None]
        content = _content(read_parts(self._model.tokenizer, token_ids, self._params.stop))
        message = {"role": "assistant", "refusal": None, **content}
        return self._choice(index, events, message=message)

    def _score(self, index: int, events: Sequence[Event]) -> dict[str, list[Any]]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text, raw = self._text_of(token), self._model.tokenizer.token(token)
            return {"token": text, "logprob": logprob, "bytes": list(raw), "id": token}

        content = []
        for event in events:
            if event.token is not None and event.logprobs is not None:
                top = [entry(*pair) for pair in event.logprobs.top]
                content.append(entry(event.token, event.logprobs.logprob) | {"top_logprobs": top})
        return {"content": content}


class ResponsesAnswer(ChatAnswer):
    """Answer in the form of `POST /v1/responses`; its stream's events are typed and numbered."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._number = 0
        self._common = {"id": _new_id("resp_"), "object": "response"}
        self._common |= {"created_at": int(time.time()), "model": self._model.name, "error": None}
        self._common |= {"metadata": {}, "tools": [], "tool_choice": "none"}
        self._common |= {"parallel_tool_calls": False, "store": False}
        self._place = {"item_id": _new_id("msg_"), "output_index": 0, "content_index": 0}

    def whole(self) -> dict[str, Any]:
        totals, choice = self._totals(), self.whole_choice(0, self._stream.said[0])
        usage, cut = totals["usage"], choice["finish_reason"] == "length"
        status = "incomplete" if cut else "completed"
        return {
            **self._common,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._item(status, _output(choice["message"]["content"]))],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            "timings": totals["timings"],
        }

    async def shown(self) -> AsyncIterator[list[Any]]:
        begun = {**self._common, "status": "in_progress", "output": []}
        item = self._item("in_progress")
        yield [
            self._event("response.created", response=begun),
            self._event("response.output_item.added", item=item, output_index=0),
            self._event("response.content_part.added", **self._place, part=_output("")),
        ]
        async for found in self._stream.arriving():
            texts = [self.next_choice(*each)["delta"]["content"] for each in found.items()]
            kind = "response.output_text.delta"
            shown = [self._event(kind, **self._place, delta=text) for text in texts if text]
            yield shown if self._stream.open_samples else [*shown, *self._end()]

    def _end(self) -> list[dict[str, Any]]:
        whole = self.whole()
        (item,) = whole["output"]
        (part,) = item["content"]
        return [
            self._event("response.output_text.done", **self._place, text=part["text"]),
            self._event("response.content_part.done", **self._place, part=part),
            self._event("response.output_item.done", item=item, output_index=0),
            self._event(f"response.{whole['status']}", response=whole),
        ]

    def failure(self, error: APIError) -> dict[str, Any]:
        return self._event("error", message=str(error), code="server_error", param=None)

    def _event(self, kind: str, **content: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, **content, "sequence_number": self._number - 1}

    def _item(self, status: str, *content: dict[str, Any]) -> dict[str, Any]:
        item = {"type": "message", "id": self._place["item_id"], "role": "assistant"}
        return {**item, "status": status, "content": content}


def _new_id(kind: str) -> str:
    return f"{kind}{random.getrandbits(96):024x}"


def _output(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}


def _content(parts: list[dict[str, Any]]) -> dict[str, Any]:
    is_text = all(part["type"] == "text" for part in parts)
    return {"content": text_of(parts)} | ({} if is_text else {"parts": parts})


def _frame(shown: Any) -> bytes:
    name = f"event: {shown['type']}\n" if "type" in shown else ""
    return f"{name}data: {shown if isinstance(shown, str) else to_json(shown)}\n\n".encode()
