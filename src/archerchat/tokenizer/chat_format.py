"""From a conversation to token ids and the mask that says which of them to learn (SPEC section 6).

A conversation is `{"messages": [...]}`; a message has a `role` and a `content`. Users write text.
The assistant writes text, or a list of parts: text, Python to run, and what it printed. The model
learns to write what the assistant writes, closing token included, and nothing else: neither the
user's words, nor the token that hands it the turn, nor a program's output, which the engine
supplies at generation time.

    <|bos|> <|user_start|> text <|user_end|> <|assistant_start|> text <|assistant_end|> ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from archerchat.errors import DataError
from archerchat.tokenizer.bpe import Tokenizer

Segment = tuple[list[int], bool]
"""Consecutive token ids, and whether to train on them."""


def render_conversation(
    tokenizer: Tokenizer, conversation: Mapping[str, Any], max_tokens: int = 2048
) -> tuple[list[int], list[int]]:
    """Render a conversation for training.

    Returns:
        Token ids and their mask (1 = learn to predict this token), equally long, both cut to
        `max_tokens`.

    Raises:
        DataError: the conversation is malformed; the message says where and how.
    """
    ids, mask = [tokenizer.bos_id], [0]
    for segment, trained in _iter_segments(tokenizer, _message_list(conversation)):
        ids += segment
        mask += [int(trained)] * len(segment)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(
    tokenizer: Tokenizer, conversation: Mapping[str, Any], max_tokens: int = 2048
) -> list[int]:
    """Render a conversation up to where the assistant is to speak.

    A last message of the assistant is left out; one of the user is answered. The token that
    starts the answer comes after the cut, so the result can be `max_tokens` + 1 long.

    Raises:
        DataError: the conversation is malformed, or holds nothing to answer.
    """
    messages = _message_list(conversation)
    if isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    ids, _ = render_conversation(tokenizer, {"messages": messages}, max_tokens)
    return [*ids, tokenizer.special_id("<|assistant_start|>")]


def _message_list(conversation: Mapping[str, Any]) -> list[Any]:
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise DataError('a conversation must be {"messages": [...]} with at least one message')
    return list(messages)


def _iter_segments(tokenizer: Tokenizer, messages: list[Any]) -> Iterator[Segment]:
    """Render the messages one by one; the system's is joined to the user's first."""
    special, system = tokenizer.special_id, ""
    first = int(_role(messages, 0) == "system")
    if first:
        system = _text(messages[0].get("content"), "message 0") + "\n\n"
        if len(messages) == 1:
            raise DataError("message 0 is the system's and no user message follows it")
    for index in range(first, len(messages)):
        expected = ("user", "assistant")[(index - first) % 2]
        role, content = _role(messages, index), messages[index].get("content")
        where = f"message {index} ({role})"
        if role != expected:
            raise DataError(
                f"message {index} has the role {role!r}, but must have {expected!r}: after an "
                "optional system message, user and assistant take turns"
            )
        if role == "user":
            ids, system = tokenizer.encode(system + _text(content, where)), ""
            yield [special("<|user_start|>"), *ids, special("<|user_end|>")], False
        else:
            yield [special("<|assistant_start|>")], False
            yield from _iter_answer(tokenizer, content, where)
            yield [special("<|assistant_end|>")], True


def _iter_answer(tokenizer: Tokenizer, content: Any, where: str) -> Iterator[Segment]:
    if isinstance(content, str):
        yield tokenizer.encode(content), True
        return
    if not isinstance(content, Sequence):
        raise DataError(f"{where} must hold text or a list of parts, not {_name(content)}")
    special = tokenizer.special_id
    for number, part in enumerate(content):
        here = f"{where}, part {number}"
        if not isinstance(part, Mapping):
            raise DataError(f'{here} must be {{"type": ..., "text": ...}}, not {_name(part)}')
        kind = part.get("type")
        if kind not in ("text", "python", "python_output"):
            raise DataError(f"{here} has the type {kind!r}, not text, python or python_output")
        ids = tokenizer.encode(_text(part.get("text"), here))
        if kind == "text":
            yield ids, True
        elif kind == "python":
            yield [special("<|python_start|>"), *ids, special("<|python_end|>")], True
        else:
            yield [special("<|output_start|>"), *ids, special("<|output_end|>")], False


def _role(messages: Sequence[Any], index: int) -> Any:
    message = messages[index]
    if not isinstance(message, Mapping):
        raise DataError(f'message {index} must be {{"role": ..., "content": ...}}, not {message!r}')
    return message.get("role")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} must hold text, not {_name(value)}")
    return value


def _name(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
