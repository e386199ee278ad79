"""`POST /v1/responses`, OpenAI's newer form of a chat: text in, text out, nothing kept."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from archerchat.serving.requests import (
    MAX_CONVERSATION_CHARACTERS,
    MAX_MESSAGES,
    ChatRequest,
    Message,
    Part,
    ResponseFormat,
    Sampled,
)
from archerchat.serving.responses import Answer, ChatChoice
from archerchat.serving.worker import GenerationFailed, Stream


class InputItem(BaseModel):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


class TextFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    content: dict[str, Any] = Field({}, alias="schema")


class TextOptions(BaseModel):
    format: TextFormat | None = None


class ResponsesRequest(Sampled):
    """Its `input` is a message of the user, or a conversation."""

    input: (
        Annotated[str, Field(min_length=1, max_length=MAX_CONVERSATION_CHARACTERS)]
        | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES - 1)]
    )
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=2**31)
    truncation: Literal["auto", "disabled"] = "auto"
    text: TextOptions | None = None
    tools: list[Any] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    previous_response_id: None = None
    n: None = None

    def to_chat(self) -> ChatRequest:
        """Return the chat that answers it."""
        items = self.input
        if isinstance(items, str):
            items = [InputItem(role="user", content=items)]
        messages = [Message(role=item.role, content=_plain(item.content)) for item in items]
        if self.instructions:
            messages.insert(0, Message(role="system", content=self.instructions))
        shared = self.model_dump(include=Sampled.model_fields.keys() | {"truncation"})
        if self.text and (form := self.text.format):
            wanted = {"type": form.type, "json_schema": {"schema": form.content}}
            shared["response_format"] = ResponseFormat.model_validate(wanted)
        return ChatRequest(**shared, messages=messages, max_tokens=self.max_output_tokens)


def _plain(content: str | list[Part]) -> str | list[Part]:
    if isinstance(content, str):
        return content
    known = ("input_text", "output_text")
    return [Part(type="text" if p.type in known else p.type, text=p.text) for p in content]


class Response:
    """An answer in this API's form."""

    def __init__(self, choice: ChatChoice, answer: Answer, model: str) -> None:
        self._choice, self._answer = choice, answer
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._common = {
            "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()),
            "model": model, "error": None, "metadata": {}, "tools": [], "tool_choice": "none",
            "parallel_tool_calls": False, "store": False,
        }  # fmt: skip

    def whole(self, stream: Stream) -> dict[str, Any]:
        """Return the finished response."""
        totals, choice = self._answer.totals(stream), self._choice.whole()
        usage, cut = totals["usage"], choice["finish_reason"] == "length"
        return {
            **self._common,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._item(choice["message"]["content"], cut)],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            "timings": totals["timings"],
        }

    def _item(self, text: str, cut: bool) -> dict[str, Any]:
        return {
            "type": "message", "id": self._item_id, "role": "assistant",
            "status": "incomplete" if cut else "completed", "content": [_part(text)],
        }  # fmt: skip

    async def events(self, stream: Stream) -> AsyncIterator[dict[str, Any]]:
        """Yield the stream's events, each with its type."""
        begun = {**self._common, "status": "in_progress", "output": []}
        yield {"type": "response.created", "response": begun}
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        item = {**self._item("", False), "status": "in_progress", "content": []}
        yield {"type": "response.output_item.added", "output_index": 0, "item": item}
        yield {"type": "response.content_part.added", **place, "part": _part("")}
        try:
            async for events in stream:
                for event in events:
                    if text := self._choice.read(event)["delta"]["content"]:
                        yield {"type": "response.output_text.delta", **place, "delta": text}
        except GenerationFailed as error:
            yield {"type": "error", "message": str(error), "code": "server_error", "param": None}
            return
        found = self.whole(stream)
        (item,) = found["output"]
        (part,) = item["content"]
        yield {"type": "response.output_text.done", **place, "text": part["text"]}
        yield {"type": "response.content_part.done", **place, "part": part}
        yield {"type": "response.output_item.done", "output_index": 0, "item": item}
        yield {"type": f"response.{found['status']}", "response": found}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}
