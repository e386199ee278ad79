"""From a conversation to token ids and the mask that says which of them to learn (SPEC section 6).

`tasks.conversation` says what a conversation is. The model learns to write what the assistant
writes, closing token included, and nothing else: neither the user's words, nor the token that hands
it the turn, nor a program's output, which the engine supplies at generation time.

    <|bos|> <|user_start|> text <|user_end|> <|assistant_start|> text <|assistant_end|> ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from archerchat.tasks.conversation import check_messages
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
    for segment, trained in _iter_segments(tokenizer, check_messages(conversation)):
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
    messages = check_messages(conversation)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    ids, _ = render_conversation(tokenizer, {"messages": messages}, max_tokens)
    return [*ids, tokenizer.special_id("<|assistant_start|>")]


def encode_answer(tokenizer: Tokenizer, content: str | list[dict[str, str]]) -> list[int]:
    """Return the token ids of an assistant's message, without those around it."""
    return [i for ids, _ in _iter_answer(tokenizer, content) for i in ids]


def _iter_segments(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> Iterator[Segment]:
    """Render the messages one by one; the system's is joined to the user's first."""
    special, system = tokenizer.special_id, ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            system = content + "\n\n"
        elif role == "user":
            ids, system = tokenizer.encode(system + content), ""
            yield [special("<|user_start|>"), *ids, special("<|user_end|>")], False
        else:
            yield [special("<|assistant_start|>")], False
            yield from _iter_answer(tokenizer, content)
            yield [special("<|assistant_end|>")], True


def _iter_answer(tokenizer: Tokenizer, content: str | list[dict[str, str]]) -> Iterator[Segment]:
    special = tokenizer.special_id
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        ids = tokenizer.encode(part["text"])
        if part["type"] == "text":
            yield ids, True
        elif part["type"] == "python":
            yield [special("<|python_start|>"), *ids, special("<|python_end|>")], True
        else:
            yield [special("<|output_start|>"), *ids, special("<|output_end|>")], False
