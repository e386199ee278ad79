"""From the engine's events to the answers of three APIs, whole or as the events of a stream.

    answer = Answer("chat.completion", card.name, stream, choices)
    answer.read(await stream.next())    # events; returns what a stream shows of them
    answer.whole()                      # the finished answer

A stream shows what `begin`, `read` and `end` return, in turn. A choice is one sample of an answer.
Its tokens that came at one time are one chunk.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from archerchat.inference.sequence import Event, TokenLogprobs
from archerchat.inference.tools import AnswerReader, Piece, read_parts
from archerchat.serving.worker import Stream
from archerchat.tasks.conversation import text_of
from archerchat.tokenizer.bpe import Tokenizer

Scored = tuple[int, TokenLogprobs | None]
FINISH = {"stop": "stop", "max_tokens": "length", "length": "length", "cancelled": "stop"}
DONE = b"data: [DONE]\n\n"


class ChatChoice:
    """A sample of an answer to a conversation; `finish` says why it ended.

    Calculator calls are no part of `content`: they are in `parts`, beside the text around them.
    """

    def __init__(
        self, tokenizer: Tokenizer, index: int, stops: Sequence[str] = (), scored: bool = False
    ) -> None:
        self._tokenizer, self._index, self._scored = tokenizer, index, scored
        self._stops, self._reader = stops, AnswerReader(tokenizer, stops)
        self._token_ids: list[int] = []
        self._entries: list[dict[str, Any]] = []
        self._begun = False
        self.finish: str | None = None

    def read(self, events: Iterable[Event]) -> dict[str, Any]:
        """Take the next events; return the choice of a chunk."""
        pieces: list[Piece] = []
        entries: list[dict[str, Any]] = []
        for event in events:
            if event.token is not None:
                self._token_ids.append(event.token)
                pieces += self._reader.read(event.token)
            if event.finish_reason is not None:
                pieces += self._reader.finish()
                self.finish = FINISH[event.finish_reason]
            entries += self._entries_of(event)
        delta: dict[str, Any] = {} if self._begun else {"role": "assistant"}
        self._begun = True
        delta["content"] = "".join(piece.text for piece in pieces if piece.type == "text")
        if any(piece.type != "text" for piece in pieces):
            delta["parts"] = [asdict(piece) for piece in pieces]
        self._entries += entries
        return self._show("delta", delta, entries)

    def whole(self) -> dict[str, Any]:
        """Return the choice of an answer in one."""
        parts = read_parts(self._tokenizer, self._token_ids, self._stops)
        message: dict[str, Any] = {"role": "assistant", "content": text_of(parts), "refusal": None}
        if any(part["type"] != "text" for part in parts):
            message["parts"] = parts
        return self._show("message", message, self._entries)

    def _show(self, name: str, said: dict[str, Any], entries: Any) -> dict[str, Any]:
        logprobs = {"content": entries} if self._scored else None
        return {"index": self._index, name: said, "logprobs": logprobs,
                "finish_reason": self.finish}  # fmt: skip

    def _entries_of(self, event: Event) -> list[dict[str, Any]]:
        if event.logprobs is None or event.token is None:
            return []

        def entry(token: int, logprob: float) -> dict[str, Any]:
            raw = self._tokenizer.token(token)
            text = raw.decode(errors="replace")
            return {"token": text, "logprob": logprob, "bytes": list(raw), "id": token}

        top = [entry(*pair) for pair in event.logprobs.top]
        return [entry(event.token, event.logprobs.logprob) | {"top_logprobs": top}]


class TextChoice:
    """A sample that continues a prompt, after the prompt itself where `echo` is given.

    Args:
        echo: the prompt's tokens to show, and their log probabilities.
        scored: whether log probabilities were asked for.
    """

    def __init__(
        self, tokenizer: Tokenizer, index: int, echo: Sequence[Scored] = (), scored: bool = False
    ) -> None:
        self._tokenizer, self._index, self._offset = tokenizer, index, 0
        self._text = tokenizer.decode(token for token, _ in echo)
        self._logprobs = self._score(echo) if scored else None
        self.finish: str | None = None

    def read(self, events: Sequence[Event]) -> dict[str, Any]:
        """Take the next events; return the choice of a chunk."""
        text = "".join(event.text for event in events)
        self._text += text
        if (reason := events[-1].finish_reason) is not None:
            self.finish = FINISH[reason]
        if self._logprobs is None:
            return self._show(text, None)
        new = self._score([(event.token, event.logprobs) for event in events
                           if event.token is not None and event.logprobs is not None])  # fmt: skip
        for name, values in new.items():
            self._logprobs[name] += values
        return self._show(text, new)

    def whole(self) -> dict[str, Any]:
        """Return the choice of an answer in one."""
        return self._show(self._text, self._logprobs)

    def _show(self, text: str, logprobs: Any) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": logprobs,
                "finish_reason": self.finish}  # fmt: skip

    def _score(self, tokens: Sequence[Scored]) -> dict[str, list[Any]]:
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        found: dict[str, list[Any]] = {name: [] for name in names}
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

    def _text_of(self, token: int) -> str:
        return self._tokenizer.token(token).decode(errors="replace")


@dataclass(eq=False)
class Answer:
    """A chat completion or a completion."""

    kind: str
    """That of the object, as OpenAI's API names it."""
    model: str
    stream: Stream
    choices: Sequence[ChatChoice] | Sequence[TextChoice]
    wants_usage: bool = False
    """Whether a stream ends with its usage."""
    dropped: int = 0
    """Messages that the context had no room for."""

    def __post_init__(self) -> None:
        self._common = {"id": _new_id(f"{self.kind}-"), "created": int(time.time()),
                        "model": self.model}  # fmt: skip
        chunk = self.kind.replace("chat.completion", "chat.completion.chunk")
        self._of_chunk = {**self._common, "object": chunk}

    def begin(self) -> list[Any]:
        """Return what a stream shows first: the prompts' echo."""
        wholes = [choice.whole() for choice in self.choices]
        return [{**self._of_chunk, "choices": [each]} for each in wholes if each.get("text")]

    def read(self, events: Sequence[tuple[int, Event]]) -> list[Any]:
        """Take the next events, each with its choice's number; return what a stream shows."""
        of_choice: dict[int, list[Event]] = {}
        for number, event in events:
            of_choice.setdefault(number, []).append(event)
        chunks = [{**self._of_chunk, "choices": [self.choices[number].read(found)]}
                  for number, found in of_choice.items()]  # fmt: skip
        if chunks and not self.stream.open_samples:
            chunks[-1]["timings"] = self.stream.timings()
        return chunks

    def end(self) -> list[Any]:
        """Return what a stream shows last."""
        usage = [{**self._of_chunk, "choices": [], **self._totals()}] if self.wants_usage else []
        return [*usage, DONE]

    def fail(self, message: str) -> list[Any]:
        """Return what a stream shows if the model fails."""
        return [
            {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
        ]

    def whole(self) -> dict[str, Any]:
        """Return an answer in one."""
        shown = [choice.whole() for choice in self.choices]
        return {**self._common, "object": self.kind, "choices": shown, **self._totals()}

    def _totals(self) -> dict[str, Any]:
        """Return the tokens and the time that the answer took."""
        prompt = sum(len(request.prompt) for request in self.stream.requests)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": self.stream.tokens,
            "total_tokens": prompt + self.stream.tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.stream.cached.values())},
        }
        if self.dropped:
            usage["dropped_messages"] = self.dropped
        return {"usage": usage, "timings": self.stream.timings()}


class ResponsesAnswer(Answer):
    """An answer in the form of `POST /v1/responses`; its stream's events are typed and numbered."""

    def __post_init__(self) -> None:
        self._number, self._item_id = 0, _new_id("msg_")
        self._common = {
            "id": _new_id("resp_"), "object": "response", "created_at": int(time.time()),
            "model": self.model, "error": None, "metadata": {}, "tools": [], "tool_choice": "none",
            "parallel_tool_calls": False, "store": False,
        }  # fmt: skip

    def whole(self) -> dict[str, Any]:
        totals, choice = self._totals(), self.choices[0].whole()
        usage, cut = totals["usage"], choice["finish_reason"] == "length"
        return {
            **self._common,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._item("incomplete" if cut else "completed",
                                  _output(choice["message"]["content"]))],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            "timings": totals["timings"],
        }  # fmt: skip

    def begin(self) -> list[Any]:
        begun = {**self._common, "status": "in_progress", "output": []}
        return [
            self._event("response.created", response=begun),
            self._event(
                "response.output_item.added", item=self._item("in_progress"), output_index=0
            ),
            self._event("response.content_part.added", **self._place(), part=_output("")),
        ]

    def read(self, events: Sequence[tuple[int, Event]]) -> list[Any]:
        text = self.choices[0].read([event for _, event in events])["delta"]["content"]
        return (
            [self._event("response.output_text.delta", **self._place(), delta=text)] if text else []
        )

    def end(self) -> list[Any]:
        found = self.whole()
        (item,) = found["output"]
        (part,) = item["content"]
        return [
            self._event("response.output_text.done", **self._place(), text=part["text"]),
            self._event("response.content_part.done", **self._place(), part=part),
            self._event("response.output_item.done", item=item, output_index=0),
            self._event(f"response.{found['status']}", response=found),
        ]

    def fail(self, message: str) -> list[Any]:
        return [self._event("error", message=message, code="server_error", param=None)]

    def _event(self, kind: str, **content: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, **content, "sequence_number": self._number - 1}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _item(self, status: str, *content: dict[str, Any]) -> dict[str, Any]:
        return {"type": "message", "id": self._item_id, "role": "assistant", "status": status,
                "content": content}  # fmt: skip


def _new_id(kind: str) -> str:
    return f"{kind}{random.getrandbits(96):024x}"


def _output(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}
