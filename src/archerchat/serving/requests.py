"""What clients ask: the shapes of OpenAI's requests, and what they mean for the engine.

Limits live in the types. Fields that these classes do not have are ignored, as clients send many;
those that would change the answer and are not supported are refused.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain, cycle
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.tiktoken import lltokenizer_from_encoding
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from archerchat.inference.chat import CHAT_SAMPLING
from archerchat.inference.sampling_params import MAX_LOGPROBS, SamplingParams
from archerchat.inference.sequence import Request
from archerchat.serving.guard import APIError
from archerchat.tasks.conversation import PART_TYPES
from archerchat.tokenizer.bpe import Tokenizer

MAX_MESSAGES = 500
MAX_MESSAGE_CHARACTERS = 8_000
MAX_CONVERSATION_CHARACTERS = 32_000
MAX_PROMPTS = 256
MAX_PROMPT_CHARACTERS = 1_000_000
MAX_SCHEMA_BYTES = 64_000
MAX_SAMPLES = 128
TURNS = "after an optional system message, user and assistant take turns"
COMPLETION_TOKENS = 16
"""Tokens of a completion that names no number, as in OpenAI's API."""

Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
TokenIds = Annotated[list[int], Field(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Tokens = Annotated[int, Field(ge=1, le=2**31)]
NUMBERS = {"temperature", "top_p", "min_p"}
NUMBERS |= {"repetition_penalty", "presence_penalty", "frequency_penalty"}
LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One layout of JSON, since a small model given the choice may write spaces without end."""


def _refused(param: str, problem: str) -> APIError:
    return APIError(f"{param} {problem}", param)


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    model: str | None = None


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class Sampled(_Body):
    """Options that all generating requests have; None stands for the default."""

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

    def sampling(self, defaults: SamplingParams, **more: Any) -> SamplingParams:
        """Return the engine's parameters: `defaults`, what the request gives, and `more`."""
        given = self.model_dump(include=NUMBERS, exclude_none=True)
        if self.top_k is not None:
            given["top_k"] = self.top_k or None
        for key in self.logit_bias or ():
            if not re.fullmatch("[0-9]{1,9}", key):
                raise _refused("logit_bias", f"has {key[:20]!r} where a token id is due")
        return replace(
            defaults,
            **given,
            logit_bias={int(key): value for key, value in (self.logit_bias or {}).items()},
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            seed=random.getrandbits(63) if self.seed is None else self.seed % 2**63,
            num_samples=self.n or 1,
            **more,
        )


def _called(**names: str) -> AfterValidator:
    return AfterValidator(lambda name: names.get(name, name))


class Part(BaseModel):
    """A part of a message; users' are text."""

    type: Annotated[str, _called(input_text="text", output_text="text")]
    text: str


class Message(BaseModel):
    type: Literal["message"] = "message"
    role: Annotated[
        Literal["system", "developer", "user", "assistant"], _called(developer="system")
    ]
    content: str | list[Part]

    def read(self, where: str) -> tuple[dict[str, Any], int]:
        """Return what `chat_format` renders, and its characters; `where` is the content's place."""
        content, is_answer = self.content, self.role == "assistant"
        parts = [Part(type="text", text=content)] if isinstance(content, str) else content
        allowed = PART_TYPES if is_answer else ("text",)
        for number, part in enumerate(parts):
            if part.type not in allowed:
                problem = f"is {part.type[:40]!r}, not {' or '.join(allowed)}"
                raise _refused(f"{where}[{number}].type", problem)
        text = "".join(part.text for part in parts)
        if len(text) > MAX_MESSAGE_CHARACTERS:
            raise _refused(where, f"exceeds {MAX_MESSAGE_CHARACTERS} characters")
        if not (is_answer or text.strip()):
            raise _refused(where, "is empty: write something")
        plain = all(part.type == "text" for part in parts)
        said = text if plain else [dict(part) for part in parts]
        return {"role": self.role, "content": said}, len(text)


class ConversationRequest(_Body):
    MESSAGES: ClassVar = "messages"
    """How the client calls them."""
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)

    def conversation(self) -> list[dict[str, Any]]:
        """Return the messages in the form that `chat_format` renders."""
        found: list[dict[str, Any]] = []
        name, total = self.MESSAGES, 0
        first = int(self.messages[0].role == "system")
        due = chain(["system"] * first, cycle(["user", "assistant"]))
        for index, (message, role) in enumerate(zip(self.messages, due, strict=False)):
            if message.role != role:
                problem = f"is {message.role!r} where {role!r} is due: {TURNS}"
                raise _refused(f"{name}[{index}].role", problem)
            said, size = message.read(f"{name}[{index}].content")
            found.append(said)
            total += size
        if total > MAX_CONVERSATION_CHARACTERS:
            raise _refused(name, f"exceed {MAX_CONVERSATION_CHARACTERS} characters")
        if len(found) == first:
            raise _refused(name, "hold nothing to answer: add one of the user's")
        return found


def _is_small(schema: dict[str, Any]) -> dict[str, Any]:
    if len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode()) > MAX_SCHEMA_BYTES:
        raise ValueError(f"a schema has at most {MAX_SCHEMA_BYTES:,} bytes")
    return schema


Schema = Annotated[dict[str, Any], AfterValidator(_is_small)]


class JSONSchema(BaseModel):
    content: Schema | None = Field(None, alias="schema")


class AnswerFormat(JSONSchema):
    """The form of an answer. Chats have its schema in `json_schema`, responses in `schema`."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JSONSchema | None = None


class ChatRequest(Sampled, ConversationRequest):
    """`POST /v1/chat/completions`."""

    FORMAT: ClassVar = "response_format"
    SCHEMA: ClassVar = "json_schema"
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    truncation: Literal["auto", "disabled"] = "auto"
    """Whether a conversation longer than the context loses its oldest turns, or is refused."""
    tools: list[Any] | None = None
    """Clients offer them unasked; the model calls none of them."""
    tool_choice: Literal["none", "auto"] | None = None
    response_format: AnswerFormat | None = None

    def params(self) -> SamplingParams:
        most = self.max_completion_tokens or self.max_tokens or CHAT_SAMPLING.max_new_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(CHAT_SAMPLING, max_new_tokens=most, logprobs=logprobs)

    @property
    def format(self) -> AnswerFormat | None:
        return self.response_format

    def constrain(self, request: Request, form: AnswerFormat, tokenizer: Tokenizer) -> Request:
        """Let the model choose among the tokens that fit the wanted schema only.

        Raises:
            APIError: there is no schema, no value fits it, or llguidance cannot keep to it.
        """
        schema = (form.json_schema or form).content
        if form.type == "json_object":
            schema = {"type": "object"}
        if schema is None:
            raise _refused(f"{self.FORMAT}.{self.SCHEMA}", "is missing")
        vocabulary = _read_vocabulary(tokenizer)
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=LAYOUT)
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, vocabulary)
        matcher = partial(LLMatcher, vocabulary, grammar, log_level=0)
        if not failed:
            (start := matcher()).compute_bitmask()
            failed, messages = start.is_stopped(), ["no value fits it"]
        if failed:
            raise _refused(self.FORMAT, f"cannot be kept to: {messages[0]}")
        return replace(request, mask=lambda: _Mask(matcher()), hook=None)


@lru_cache(maxsize=4)
def _read_vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    """Return the tables that masks are computed from; they take a moment."""
    end = tokenizer.special_id("<|assistant_end|>")
    return lltokenizer_from_encoding(tokenizer.encoding, eos_token=end)


class _Mask:
    """The tokens that may come next in one answer."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher, self._consumed = matcher, 0

    def __call__(self, said: Sequence[int]) -> Sequence[int]:
        self._matcher.consume_tokens(list(said[self._consumed :]))
        self._consumed = len(said)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        ids: list[int] = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
        return ids


def _as_messages(given: Any) -> Any:
    return [{"role": "user", "content": given}] if given and isinstance(given, str) else given


class TextOptions(BaseModel):
    format: AnswerFormat | None = None


class ResponsesRequest(ChatRequest):
    """`POST /v1/responses`: a chat under other names; its `input` may be the user's text alone."""

    MESSAGES: ClassVar = "input"
    FORMAT: ClassVar = "text.format"
    SCHEMA: ClassVar = "schema"
    messages: Annotated[
        list[Message], BeforeValidator(_as_messages, json_schema_input_type=str | list[Message])
    ] = Field(alias="input", min_length=1, max_length=MAX_MESSAGES - 1)
    instructions: str | None = Field(None, max_length=MAX_MESSAGE_CHARACTERS)
    """A system message, put before that of the input."""
    max_output_tokens: Tokens | None = None
    text: TextOptions | None = None
    """Holds the form of the answer; `response_format` and `max_tokens` have no effect here."""
    previous_response_id: None = None
    n: None = None
    logprobs: None = None
    top_logprobs: None = None

    def conversation(self) -> list[dict[str, Any]]:
        found = super().conversation()
        if self.instructions:
            own = [found.pop(0)["content"]] if found[0]["role"] == "system" else []
            found.insert(0, {"role": "system", "content": "\n\n".join([self.instructions, *own])})
        return found

    def params(self) -> SamplingParams:
        most = self.max_output_tokens or CHAT_SAMPLING.max_new_tokens
        return self.sampling(CHAT_SAMPLING, max_new_tokens=most)

    @property
    def format(self) -> AnswerFormat | None:
        return self.text.format if self.text else None


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
        defaults = SamplingParams(stop_token_ids=(tokenizer.bos_id,))
        return self.sampling(defaults, max_new_tokens=most, logprobs=self.logprobs)

    @property
    def is_text(self) -> bool:
        """Whether the prompts are texts, before which BOS is put."""
        return isinstance(self.prompt, str) or isinstance(self.prompt[0], str)

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Return the token ids of each prompt; those of a text begin with BOS."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            prompt = [prompt]
        bos, encode = tokenizer.bos_id, tokenizer.encode
        return [[bos, *encode(each)] if isinstance(each, str) else each for each in prompt]


class TokenizeRequest(_Body):
    content: Text = ""
    prompt: Text | None = None
    """Another name for `content`."""
    add_special: bool = False
    """Whether BOS comes first."""


class DetokenizeRequest(_Body):
    tokens: list[int]
