"""From the engine's events to the answers of three APIs, whole or as the events of a stream.

    answer = Answer("chat.completion", model.name, stream, choices)
    answer.read(await stream.next())    # events; returns what a stream shows of them
    answer.whole()                      # the finished answer

A stream shows what `begin`, `read` and `end` return. What came at one time is one chunk.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Event
from archerchat.inference.tools import AnswerReader, read_parts
from archerchat.serving.errors import APIError
from archerchat.serving.worker import Stream
from archerchat.tasks.conversation import text_of
from archerchat.tokenizer.bpe import Tokenizer

FINISH = {"stop": "stop", "max_tokens": "length", "length": "length", "cancelled": "stop"}
DONE = b"data: [DONE]\n\n"


class Choice(ABC):
    """A sample of an answer, and what happened to it.

    `read` turns the next events into a chunk's choice; `whole` returns that of a whole answer.
    """

    def __init__(
        self, tokenizer: Tokenizer, index: int, params: SamplingParams, echo: Sequence[Event] = ()
    ) -> None:
        self._tokenizer, self._index, self._params = tokenizer, index, params
        self._events, self._offset = list(echo), 0

    def _show(self, events: Sequence[Event], **said: Any) -> dict[str, Any]:
        reason = events[-1].finish_reason if events else None
        finish = reason and FINISH[reason]
        logprobs = self._score(events) if self._params.logprobs is not None else None
        return {"index": self._index, **said, "logprobs": logprobs, "finish_reason": finish}

    @abstractmethod
    def _score(self, events: Sequence[Event]) -> dict[str, list[Any]]:
        """Return the log probabilities of events, in the API's form."""

    def _text_of(self, token: int) -> str:
        return self._tokenizer.token(token).decode(errors="replace")


class ChatChoice(Choice):
    """A sample of an answer to a conversation.

    Calculator calls are no part of `content`: they are in `parts`, beside the text around them.
    """

    def __init__(self, tokenizer: Tokenizer, index: int, params: SamplingParams) -> None:
        super().__init__(tokenizer, index, params)
        self._reader = AnswerReader(tokenizer, params.stop)

    def read(self, events: Sequence[Event]) -> dict[str, Any]:
        delta: dict[str, Any] = {} if self._events else {"role": "assistant"}
        self._events += events
        pieces = [p for e in events if e.token is not None for p in self._reader.read(e.token)]
        if events[-1].finish_reason is not None:
            pieces += self._reader.finish()
        delta["content"] = "".join(piece.text for piece in pieces if piece.type == "text")
        if any(piece.type != "text" for piece in pieces):
            delta["parts"] = [asdict(piece) for piece in pieces]
        return self._show(events, delta=delta)

    def whole(self) -> dict[str, Any]:
        token_ids = [event.token for event in self._events if event.token is not None]
        parts = read_parts(self._tokenizer, token_ids, self._params.stop)
        message: dict[str, Any] = {"role": "assistant", "content": text_of(parts), "refusal": None}
        if any(part["type"] != "text" for part in parts):
            message["parts"] = parts
        return self._show(self._events, message=message)

    def _score(self, events: Sequence[Event]) -> dict[str, list[Any]]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text, raw = self._text_of(token), self._tokenizer.token(token)
            return {"token": text, "logprob": logprob, "bytes": list(raw), "id": token}

        content = []
        for event in events:
            if event.token is not None and event.logprobs is not None:
                top = [entry(*pair) for pair in event.logprobs.top]
                content.append(entry(event.token, event.logprobs.logprob) | {"top_logprobs": top})
        return {"content": content}


class TextChoice(Choice):
    """A sample that continues a prompt, after the prompt itself where `echo` has its tokens."""

    def read(self, events: Sequence[Event]) -> dict[str, Any]:
        self._events += events
        text = "".join(event.text for event in events)
        return self._show(events, text=text)

    def whole(self) -> dict[str, Any]:
        events, self._events, self._offset = self._events, [], 0
        return self.read(events)

    def _score(self, events: Sequence[Event]) -> dict[str, list[Any]]:
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
            found["text_offset"].append(self._offset)
            self._offset += len(text)
        return found


@dataclass(eq=False)
class Answer:
    """A chat completion or a completion.

    Attributes:
        kind: of the object, as OpenAI's API names it.
        wants_usage: whether a stream ends with its usage.
        dropped: messages that the context had no room for.
    """

    kind: str
    model: str
    stream: Stream
    choices: Sequence[ChatChoice] | Sequence[TextChoice]
    wants_usage: bool = False
    dropped: int = 0

    def __post_init__(self) -> None:
        self._common = {"id": _new_id(f"{self.kind}-"), "created": int(time.time())}
        self._common |= {"model": self.model}

    def begin(self) -> list[Any]:
        """Return what a stream shows first: the prompts' echo."""
        wholes = [choice.whole() for choice in self.choices]
        return [self._chunk([each]) for each in wholes if each.get("text")]

    def read(self, events: Mapping[int, Sequence[Event]]) -> list[Any]:
        """Take the next events of each choice, by its number; return what a stream shows."""
        chunks = [self._chunk([self.choices[i].read(found)]) for i, found in events.items()]
        if chunks and not self.stream.open_samples:
            chunks[-1]["timings"] = self.stream.timings()
        return chunks

    def end(self) -> list[Any]:
        """Return what a stream shows last."""
        usage = [{**self._chunk([]), **self._totals()}] if self.wants_usage else []
        return [*usage, DONE]

    def fail(self, error: APIError) -> list[Any]:
        """Return what a stream shows if the model fails."""
        return [error.content()]

    def whole(self) -> dict[str, Any]:
        """Return an answer in one."""
        shown = [choice.whole() for choice in self.choices]
        return {**self._common, "object": self.kind, "choices": shown, **self._totals()}

    def _chunk(self, choices: list[Any]) -> dict[str, Any]:
        kind = self.kind.replace("chat.completion", "chat.completion.chunk")
        return {**self._common, "object": kind, "choices": choices}

    def _totals(self) -> dict[str, Any]:
        """Return the tokens and the time that the answer took."""
        stream = self.stream
        usage: dict[str, Any] = {
            "prompt_tokens": stream.prompt_tokens,
            "completion_tokens": stream.tokens,
            "total_tokens": stream.prompt_tokens + stream.tokens,
            "prompt_tokens_details": {"cached_tokens": stream.cached},
        }
        if self.dropped:
            usage["dropped_messages"] = self.dropped
        return {"usage": usage, "timings": stream.timings()}


class ResponsesAnswer(Answer):
    """An answer in the form of `POST /v1/responses`; its stream's events are typed and numbered."""

    def __post_init__(self) -> None:
        self._number = 0
        self._common = {"id": _new_id("resp_"), "object": "response"}
        self._common |= {"created_at": int(time.time()), "model": self.model, "error": None}
        self._common |= {"metadata": {}, "tools": [], "tool_choice": "none"}
        self._common |= {"parallel_tool_calls": False, "store": False}
        self._place = {"item_id": _new_id("msg_"), "output_index": 0, "content_index": 0}

    def whole(self) -> dict[str, Any]:
        totals, choice = self._totals(), self.choices[0].whole()
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

    def begin(self) -> list[Any]:
        begun = {**self._common, "status": "in_progress", "output": []}
        item = self._item("in_progress")
        return [
            self._event("response.created", response=begun),
            self._event("response.output_item.added", item=item, output_index=0),
            self._event("response.content_part.added", **self._place, part=_output("")),
        ]

    def read(self, events: Mapping[int, Sequence[Event]]) -> list[Any]:
        texts = [self.choices[i].read(found)["delta"]["content"] for i, found in events.items()]
        kind = "response.output_text.delta"
        return [self._event(kind, **self._place, delta=text) for text in texts if text]

    def end(self) -> list[Any]:
        found = self.whole()
        (item,) = found["output"]
        (part,) = item["content"]
        return [
            self._event("response.output_text.done", **self._place, text=part["text"]),
            self._event("response.content_part.done", **self._place, part=part),
            self._event("response.output_item.done", item=item, output_index=0),
            self._event(f"response.{found['status']}", response=found),
        ]

    def fail(self, error: APIError) -> list[Any]:
        return [self._event("error", message=str(error), code="server_error", param=None)]

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
