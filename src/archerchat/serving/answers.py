"""From the engine's events to the answers of three APIs, whole or as the events of a stream.

    answer = Answer("chat.completion", card.name, stream, choices)
    answer.read(number, event)     # for each event; returns what a stream shows of it
    answer.whole()                 # the finished answer

A stream shows what `begin`, `read` and `end` return, in turn. A choice is one sample of an answer.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from archerchat.inference.sequence import Event, TokenLogprobs
from archerchat.inference.tools import AnswerReader, read_parts
from archerchat.serving.worker import Stream
from archerchat.tasks.conversation import text_of
from archerchat.tokenizer.bpe import Tokenizer

FINISH = {"stop": "stop", "max_tokens": "length", "length": "length", "cancelled": "stop"}
DONE = "[DONE]"


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

    def read(self, event: Event) -> dict[str, Any]:
        """Take the next event; return the choice of a chunk."""
        pieces = []
        if event.token is not None:
            self._token_ids.append(event.token)
            pieces = self._reader.read(event.token)
        if event.finish_reason is not None:
            pieces += self._reader.finish()
            self.finish = FINISH[event.finish_reason]
        delta: dict[str, Any] = {} if self._begun else {"role": "assistant"}
        self._begun = True
        delta["content"] = "".join(piece.text for piece in pieces if piece.type == "text")
        if any(piece.type != "text" for piece in pieces):
            delta["parts"] = [{"type": piece.type, "text": piece.text} for piece in pieces]
        entries = self._entries_of(event)
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
        self,
        tokenizer: Tokenizer,
        index: int,
        echo: Sequence[tuple[int, TokenLogprobs | None]] = (),
        scored: bool = False,
    ) -> None:
        self._tokenizer, self._index, self._offset = tokenizer, index, 0
        self._text = tokenizer.decode(token for token, _ in echo)
        self._logprobs = self._score(echo) if scored else None
        self.finish: str | None = None

    def read(self, event: Event) -> dict[str, Any]:
        """Take the next event; return the choice of a chunk."""
        self._text += event.text
        self.finish = FINISH[event.finish_reason] if event.finish_reason else None
        if self._logprobs is None:
            return self._show(event.text, None)
        scored = event.token is not None and event.logprobs is not None
        new = self._score([(event.token, event.logprobs)] if scored else [])  # type: ignore[list-item]
        for name, values in new.items():
            self._logprobs[name] += values
        return self._show(event.text, new)

    def whole(self) -> dict[str, Any]:
        """Return the choice of an answer in one."""
        return self._show(self._text, self._logprobs)

    def _show(self, text: str, logprobs: Any) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": logprobs,
                "finish_reason": self.finish}  # fmt: skip

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

    def _text_of(self, token: int) -> str:
        return self._tokenizer.token(token).decode(errors="replace")


class Answer:
    """A chat completion or a completion.

    Args:
        kind: of object, as OpenAI's API names it.
        wants_usage: whether a stream ends with its usage.
        dropped: messages that the context had no room for.
    """

    def __init__(
        self,
        kind: str,
        model: str,
        stream: Stream,
        choices: Sequence[ChatChoice] | Sequence[TextChoice],
        wants_usage: bool = False,
        dropped: int = 0,
    ) -> None:
        self.stream, self.choices, self._dropped = stream, choices, dropped
        self._open_choices = len(choices)
        self._kind, self._wants_usage = kind, wants_usage
        self._common = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()),
                        "model": model}  # fmt: skip
        chunk = kind.replace("chat.completion", "chat.completion.chunk")
        self._of_chunk = {**self._common, "object": chunk}

    def begin(self) -> list[Any]:
        """Return what a stream shows first: the prompts' echo."""
        wholes = [choice.whole() for choice in self.choices]
        return [{**self._of_chunk, "choices": [each]} for each in wholes if each.get("text")]

    def read(self, number: int, event: Event) -> list[Any]:
        """Take the next event of a choice; return what a stream shows of it."""
        chunk = {**self._of_chunk, "choices": [self.choices[number].read(event)]}
        self._open_choices -= event.finish_reason is not None
        if not self._open_choices:
            chunk["timings"] = self.stream.timings()
        return [chunk]

    def end(self) -> list[Any]:
        """Return what a stream shows last."""
        usage = [{**self._of_chunk, "choices": [], **self._totals()}] if self._wants_usage else []
        return [*usage, DONE]

    def fail(self, message: str) -> list[Any]:
        """Return what a stream shows if the model fails."""
        kind = {"type": "server_error", "param": None, "code": None}
        return [{"error": {"message": message, **kind}}]

    def whole(self) -> dict[str, Any]:
        """Return an answer in one."""
        shown = [choice.whole() for choice in self.choices]
        return {**self._common, "object": self._kind, "choices": shown, **self._totals()}

    def _totals(self) -> dict[str, Any]:
        """Return the tokens and the time that the answer took."""
        prompt = sum(len(request.prompt) for request in self.stream.requests)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": self.stream.tokens,
            "total_tokens": prompt + self.stream.tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.stream.cached.values())},
        }
        if self._dropped:
            usage["dropped_messages"] = self._dropped
        return {"usage": usage, "timings": self.stream.timings()}


class Response(Answer):
    """An answer in the form of `POST /v1/responses`; its stream's events are typed and numbered."""

    def __init__(self, kind: str, model: str, *more: Any) -> None:
        super().__init__(kind, model, *more)
        self._number = 0
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._common = {
            "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()),
            "model": model, "error": None, "metadata": {}, "tools": [], "tool_choice": "none",
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
            self._event("created", response=begun),
            self._event("output_item.added", item=self._item("in_progress"), output_index=0),
            self._event("content_part.added", **self._place(), part=_output("")),
        ]

    def read(self, number: int, event: Event) -> list[Any]:
        text = self.choices[0].read(event)["delta"]["content"]
        return [self._event("output_text.delta", **self._place(), delta=text)] if text else []

    def end(self) -> list[Any]:
        found = self.whole()
        (item,) = found["output"]
        (part,) = item["content"]
        return [
            self._event("output_text.done", **self._place(), text=part["text"]),
            self._event("content_part.done", **self._place(), part=part),
            self._event("output_item.done", item=item, output_index=0),
            self._event(found["status"], response=found),
        ]

    def fail(self, message: str) -> list[Any]:
        return [{"type": "error", "message": message, "code": "server_error", "param": None}]

    def _event(self, name: str, **content: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": f"response.{name}", **content, "sequence_number": self._number - 1}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _item(self, status: str, *content: dict[str, Any]) -> dict[str, Any]:
        return {"type": "message", "id": self._item_id, "role": "assistant", "status": status,
                "content": content}  # fmt: skip


def _output(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}
