"""What a conversation is, and the check that a file's conversations have to pass.

A conversation is `{"messages": [...]}`, each message `{"role": ..., "content": ...}`. Users write
text; the assistant writes text or a list of parts, `{"type": ..., "text": ...}`, where the type is
`text`, `python` (to be run) or `python_output` (what it printed). Files may also have what OpenAI's
do: text of others as a list of parts, and a developer for the system. `tokenizer.chat_format`
renders it. A task may add keys of its own beside `messages`, for its own judgement of an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from archerchat.errors import DataError

Conversation = dict[str, Any]

PART_TYPES = ("text", "python", "python_output")
UNSUPPORTED = ("tool_calls", "function_call", "tools", "functions")
"""Keys of OpenAI's files that say what cannot be learned here."""


def user(text: str) -> dict[str, Any]:
    """Return a message of the user."""
    return {"role": "user", "content": text}


def assistant(content: str | list[dict[str, str]]) -> dict[str, Any]:
    """Return a message of the assistant: text or parts."""
    return {"role": "assistant", "content": content}


def part(kind: str, text: str) -> dict[str, str]:
    """Return a part of an assistant's message; `kind` is one of `PART_TYPES`."""
    assert kind in PART_TYPES
    return {"type": kind, "text": text}


def text_of(content: str | Iterable[Mapping[str, str]]) -> str:
    """Return what an assistant's message says in words: its text without Python and outputs."""
    if isinstance(content, str):
        return content
    return "".join(each["text"] for each in content if each["type"] == "text")


def check_conversation(value: Any, where: str) -> Conversation:
    """Return the conversation in `value`: `{"messages": [...]}`, or the bare list of messages.

    Other people's text in parts is joined, and a developer is the system.

    It must be one that can be learned from: an optional system message, then user and assistant
    taking turns, with no empty content, and at least one answer.

    Args:
        where: the place to name in errors, such as `talks.jsonl:12`.

    Raises:
        DataError: it is not.
    """
    messages = value.get("messages") if isinstance(value, Mapping) else value
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f'{where}: a conversation is {{"messages": [...]}} or the list itself, with at least '
            f"one message, not {_show(value)}"
        )
    _refuse_tools(value, where)
    messages = [_read_message(each, f"{where}, message {n}") for n, each in enumerate(messages)]
    first = int(messages[0]["role"] == "system")
    if len(messages) - first < 2:
        raise DataError(
            f"{where}: {len(messages)} message(s) hold no answer to learn: the user's must be "
            f"followed by the assistant's"
        )
    for number, message in enumerate(messages):
        here = f"{where}, message {number}"
        role, expected = message["role"], "system"
        if number >= first:
            expected = ("user", "assistant")[(number - first) % 2]
        if role != expected:
            raise DataError(
                f"{here}: the role is {_show(role)} where {expected!r} is due: after an optional "
                f"system message, user and assistant take turns"
            )
        _check_content(message["content"], expected, here)
    return {**(value if isinstance(value, Mapping) else {}), "messages": messages}


def _read_message(message: Any, here: str) -> dict[str, Any]:
    _refuse_tools(message, here)
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise DataError(f'{here}: it must be {{"role": ..., "content": ...}}, not {_show(message)}')
    role, content = message["role"], message["content"]
    if role in ("tool", "function") or message.get("weight") == 0:
        what = "messages of weight 0" if message.get("weight") == 0 else "tool calls"
        raise DataError(f"{here}: {what} are not supported: remove the conversation")
    if (
        role != "assistant"
        and isinstance(content, list)
        and content
        and all(map(_is_text, content))
    ):
        content = "".join(each["text"] for each in content)
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def _is_text(value: Any) -> bool:
    is_part = isinstance(value, Mapping) and value.get("type") == "text"
    return is_part and isinstance(value.get("text"), str)


def _refuse_tools(value: Any, here: str) -> None:
    found = [key for key in UNSUPPORTED if isinstance(value, Mapping) and value.get(key)]
    if found:
        raise DataError(f"{here}: tool calls ({found[0]}) are not supported: remove them")


def _check_content(content: Any, role: str, here: str) -> None:
    if role != "assistant" and not isinstance(content, str):
        raise DataError(f"{here} ({role}): only text can be learned, not {_show(content)}")
    if isinstance(content, str):
        if not content.strip():
            raise DataError(
                f"{here} ({role}): content is empty: fill it in or remove the conversation"
            )
        return
    if not isinstance(content, list) or not content:
        raise DataError(
            f"{here} (assistant): content must be text or a list of parts, not {_show(content)}"
        )
    for number, each in enumerate(content):
        place = f"{here}, part {number}"
        if not isinstance(each, Mapping):
            raise DataError(f'{place}: it must be {{"type": ..., "text": ...}}, not {_show(each)}')
        if each.get("type") not in PART_TYPES:
            raise DataError(
                f"{place}: the type {_show(each.get('type'))} is unknown: use "
                f"{', '.join(PART_TYPES)}"
            )
        # Programs may print nothing, and text between two parts may be a space.
        if not isinstance(each.get("text"), str) or (each["type"] == "python" and not each["text"]):
            raise DataError(f"{place}: its text is {_show(each.get('text'))}: it must be text")


def _show(value: Any) -> str:
    """Return `value` as it reads in an error, cut to a line."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
