"""What clients ask: the shapes of OpenAI's requests, and what they mean for the engine.

Limits live in the types. Fields that these classes do not have are ignored, as clients send many;
those that would change the answer and are not supported are refused.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from archerchat.errors import UsageError
from archerchat.inference.chat import CHAT_SAMPLING
from archerchat.inference.sampling_params import MAX_LOGPROBS, SamplingParams
from archerchat.tasks.conversation import PART_TYPES
from archerchat.tokenizer.bpe import Tokenizer

MAX_MESSAGES = 500
MAX_MESSAGE_CHARACTERS = 8_000
MAX_CONVERSATION_CHARACTERS = 32_000
MAX_PROMPTS = 256
MAX_PROMPT_CHARACTERS = 1_000_000
MAX_SCHEMA_CHARACTERS = 64_000
MAX_SAMPLES = 128
SAMPLED = {"temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
           "frequency_penalty"}  # fmt: skip
COMPLETION_TOKENS = 16
"""Tokens of a completion that names no number, as in OpenAI's API."""

Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
TokenIds = Annotated[list[int], Field(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]


class BadRequest(UsageError):
    """Report a request that cannot be answered, by the field that is wrong and what is."""

    def __init__(self, param: str, problem: str, code: str | None = None) -> None:
        super().__init__(f"{param} {problem}")
        self.param, self.problem, self.code = param, problem, code


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    model: str | None = None


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class Sampled(_Body):
    """Options that both kinds of request have; None stands for the default."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=200)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Bias] | None = Field(None, max_length=1024)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    n: int | None = Field(None, ge=1, le=MAX_SAMPLES)
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """Return the engine's parameters: `defaults`, with what the request gives.

        Raises:
            UsageError: a value, or the text of a token id, is out of range.
        """
        given = self.model_dump(include=SAMPLED, exclude_none=True)
        if self.top_k is not None:
            given["top_k"] = self.top_k or None
        bias = {_token_id(key): value for key, value in (self.logit_bias or {}).items()}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**63
        return replace(
            defaults, **given, logit_bias=bias, stop=stop, seed=seed, num_samples=self.n or 1
        )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class Part(BaseModel):
    """A part of a message; users' are text."""

    type: str
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


class ConversationRequest(_Body):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)


class JsonSchema(BaseModel):
    content: dict[str, Any] = Field(alias="schema")

    @field_validator("content")
    @classmethod
    def _is_small(cls, content: dict[str, Any]) -> dict[str, Any]:
        assert len(json.dumps(content)) <= MAX_SCHEMA_CHARACTERS, "is too long a schema"
        return content


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @property
    def schema_content(self) -> dict[str, Any] | None:
        """The schema of the answer; None for text."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise BadRequest("response_format.json_schema", "is missing")
            return self.json_schema.content
        return {"type": "object"} if self.type == "json_object" else None


class ChatRequest(Sampled, ConversationRequest):
    """`POST /v1/chat/completions`."""

    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    truncation: Literal["auto", "disabled"] = "auto"
    """Whether a conversation longer than the context loses its oldest turns, or is refused."""
    tools: list[Any] | None = None
    """Clients offer them unasked; the model calls none of them."""
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None

    def params(self) -> SamplingParams:
        """Return the engine's parameters."""
        most = self.max_completion_tokens or self.max_tokens or CHAT_SAMPLING.max_new_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return replace(self.sampling(CHAT_SAMPLING), max_new_tokens=most, logprobs=logprobs)


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: int | None = Field(None, ge=0, le=2**31)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    suffix: str | None = Field(None, max_length=0)

    def params(self, tokenizer: Tokenizer) -> SamplingParams:
        """Return the engine's parameters; `max_tokens: 0` is for the caller to see."""
        most = COMPLETION_TOKENS if self.max_tokens is None else max(self.max_tokens, 1)
        params = replace(self.sampling(SamplingParams()), max_new_tokens=most)
        return replace(params, logprobs=self.logprobs, stop_token_ids=(tokenizer.bos_id,))

    @property
    def is_text(self) -> bool:
        """Whether the prompts are texts, before which BOS is put."""
        return isinstance(self.prompt, str) or isinstance(self.prompt[0], str)

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Return the token ids of each prompt; those of a text begin with BOS."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            prompt = [prompt]
        bos = tokenizer.bos_id
        rows = [[bos, *tokenizer.encode(p)] if isinstance(p, str) else list(p) for p in prompt]
        check_ids("prompt", [i for row in rows for i in row], tokenizer)
        return rows


class TokenizeRequest(_Body):
    content: Text = ""
    prompt: Text | None = None
    """Another name for `content`."""
    add_special: bool = False
    """Whether BOS comes first."""


class DetokenizeRequest(_Body):
    tokens: list[int]


def check_ids(field: str, ids: Sequence[int], tokenizer: Tokenizer) -> None:
    """Refuse ids that the vocabulary does not have."""
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
        raise BadRequest(field, f"has a token id outside 0 to {tokenizer.vocab_size - 1}")


def _token_id(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise BadRequest("logit_bias", f"has {text[:20]!r} where a token id is due")
    return int(text)


def read_conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages in the form that `chat_format` renders.

    Raises:
        BadRequest: one is empty or too long, its role is not due, or none is the user's.
    """
    found: list[dict[str, Any]] = []
    first, total = int(messages[0].role in ("system", "developer")), 0
    for index, message in enumerate(messages):
        where, content = f"messages[{index}]", message.content
        role = "system" if message.role == "developer" else message.role
        due = "system" if index < first else ("user", "assistant")[(index - first) % 2]
        if role != due:
            raise BadRequest(
                f"{where}.role",
                f"is {role!r} where {due!r} is due: after an optional system message, user and "
                "assistant take turns",
            )
        parts = [Part(type="text", text=content)] if isinstance(content, str) else content
        allowed = PART_TYPES if role == "assistant" else ("text",)
        for number, part in enumerate(parts):
            if part.type not in allowed:
                place = f"{where}.content[{number}].type"
                raise BadRequest(place, f"is {part.type[:40]!r}, not {' or '.join(allowed)}")
        text = "".join(part.text for part in parts)
        total += len(text)
        if len(text) > MAX_MESSAGE_CHARACTERS:
            raise BadRequest(f"{where}.content", f"exceeds {MAX_MESSAGE_CHARACTERS} characters")
        if role != "assistant" and not text.strip():
            raise BadRequest(f"{where}.content", "is empty: write something")
        plain = all(part.type == "text" for part in parts)
        found.append({"role": role, "content": text if plain else [dict(p) for p in parts]})
    if total > MAX_CONVERSATION_CHARACTERS:
        raise BadRequest("messages", f"exceed {MAX_CONVERSATION_CHARACTERS} characters")
    if len(messages) == first:
        raise BadRequest("messages", "hold nothing to answer: add one of the user's")
    return found
