"""The format of conversations, other tools' layouts, and the checks before one is learned from.

A conversation is `{"messages": [...]}`, each message `{"role": ..., "content": ...}`. Users write
text; the assistant writes text or a list of parts, `{"type": ..., "text": ...}`, where the type is
`text`, `python` (to be run) or `python_output` (what it printed). `tokenizer.chat_format` renders
conversations. A task may add its own keys beside `messages`, to judge answers by them.

OpenAI    {"messages": [...]} or the list alone, with parts of a user's text and a developer
ShareGPT  {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", ...}, ...]}
Alpaca    {"instruction": "Add them.", "input": "1, 2", "output": "3"}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

from archerchat.errors import DataError, UsageError
from archerchat.files import write_bytes

Conversation = dict[str, Any]
Layout = Literal["openai", "sharegpt", "alpaca"]
_KEYS = {"conversations": "ShareGPT", "instruction": "Alpaca"}
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
PART_TYPES = ("text", "python", "python_output")
UNSUPPORTED = ("tool_calls", "function_call", "tools", "functions")
"""Keys of OpenAI's files for tool calls, which are not supported."""


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
    """Return the text of an assistant's message, without Python and outputs."""
    if isinstance(content, str):
        return content
    return "".join(each["text"] for each in content if each["type"] == "text")


def check_messages(conversation: Any) -> list[dict[str, Any]]:
    """Return a conversation's messages, after checking that they can be rendered.

    They are an optional system message, then user and assistant messages in turn.

    Raises:
        DataError: it is malformed; the message says where and how.
    """
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(
            'a conversation is {"messages": [...]} or the list itself, with at least one message, '
            f"not {_show(conversation)}"
        )
    turns = cycle(("user", "assistant"))
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(
                f'message {number}: it must be {{"role": ..., "content": ...}}, not '
                f"{_show(message)}"
            )
        role = message["role"]
        expected = "system" if number == 0 and role == "system" else next(turns)
        if role != expected:
            raise DataError(
                f"message {number}: the role is {_show(role)} where {expected!r} is due: after an "
                f"optional system message, user and assistant take turns"
            )
        _check_content(message["content"], role, f"message {number}")
    if messages[-1]["role"] == "system":
        raise DataError("message 0 is the system's and no user message follows it")
    return messages


def _check_content(content: Any, role: str, here: str) -> None:
    if role != "assistant" and not isinstance(content, str):
        raise DataError(f"{here} ({role}): only text can be learned, not {_show(content)}")
    if not isinstance(content, str | list):
        raise DataError(
            f"{here} (assistant): content must be text or a list of parts, not {_show(content)}"
        )
    for number, each in enumerate(content if isinstance(content, list) else ()):
        if not _is_part(each, PART_TYPES):
            raise DataError(
                f'{here}, part {number}: it must be {{"type": ..., "text": ...}} with text and one '
                f"of the types {', '.join(PART_TYPES)}, not {_show(each)}"
            )


def _is_part(value: Any, types: Sequence[str]) -> bool:
    known = isinstance(value, Mapping) and value.get("type") in types
    return known and isinstance(value.get("text"), str)


def check_conversation(value: Any) -> Conversation:
    """Return the conversation in `value`, which has any of the layouts, in ours.

    It must have an answer to learn from, and no empty content.

    Raises:
        DataError: it is malformed; the message says where and how.
    """
    conversation = {"messages": value} if isinstance(value, list) else _parse_layout(value)
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if isinstance(messages, list):
        _refuse_tools(conversation, "")
        own = [_read_message(each, f"message {number}: ") for number, each in enumerate(messages)]
        conversation = {**conversation, "messages": own}
    messages = check_messages(conversation)
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(
            f"{len(messages)} message(s) hold no answer to learn: the user's must be followed by "
            "the assistant's"
        )
    for number, message in enumerate(messages):
        if _is_empty(message["content"]):
            raise DataError(
                f"message {number} ({message['role']}): content is empty: fill it in or remove "
                "the conversation"
            )
    return dict(conversation)


def _read_message(message: Any, here: str) -> Any:
    """Convert a message from OpenAI's format to ours; refuse tool calls and zero weights."""
    if not isinstance(message, Mapping):
        return message
    _refuse_tools(message, here)
    role, content = message.get("role"), message.get("content")
    if role in ("tool", "function") or message.get("weight") == 0:
        what = "messages of weight 0" if message.get("weight") == 0 else "tool calls"
        raise DataError(f"{here}{what} are not supported: remove the conversation")
    changed = {"role": "system"} if role == "developer" else {}
    parts = content if isinstance(content, list) and role != "assistant" else []
    if parts and all(_is_part(each, ["text"]) for each in parts):
        changed["content"] = "".join(each["text"] for each in parts)
    return {**message, **changed}


def _refuse_tools(value: Mapping[str, Any], here: str) -> None:
    if found := [key for key in UNSUPPORTED if value.get(key)]:
        raise DataError(f"{here}tool calls ({found[0]}) are not supported: remove them")


def _is_empty(content: str | list[dict[str, str]]) -> bool:
    """Whether there is no text, no part, or an empty program, whose output may be empty."""
    if isinstance(content, str):
        return not content.strip()
    return not content or any(each["type"] == "python" and not each["text"] for each in content)


def _show(value: Any) -> str:
    """Return `value` for an error message, truncated to 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def find_layout(value: Any) -> str:
    """Return the layout of a line; an unknown one counts as OpenAI's, whose checks refuse it."""
    known = isinstance(value, Mapping) and "messages" not in value
    return next((layout for key, layout in _KEYS.items() if known and key in value), "OpenAI")


def _parse_layout(value: Any) -> Any:
    """Return a line as `{"messages": [...]}`, which is not checked yet."""
    layout = find_layout(value)
    if layout == "OpenAI":
        return value
    if layout == "Alpaca":
        fields = [value.get(name) or "" for name in ("instruction", "input", "output", "system")]
        history = value.get("history") or []
        pairs = isinstance(history, list) and all(map(_is_pair, history))
        if not pairs or not all(isinstance(each, str) for each in fields):
            raise DataError("instruction, input and output are text, history pairs of it")
        question, given, answer, system = fields
        turns = [*history, ("\n\n".join(filter(None, [question, given])), answer)]
        messages = [m for asked, said in turns for m in (user(asked), assistant(said))]
    else:
        system, messages = value.get("system") or "", []
        given = value["conversations"]
        for number, turn in enumerate(given if isinstance(given, list) else [given]):
            if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
                raise DataError(f'turn {number} must be {{"from": ..., "value": ...}}')
            role = ROLES.get(str(turn["from"]), turn["from"])
            more = {key: turn[key] for key in turn.keys() - {"from", "value"}}
            messages.append({**more, "role": role, "content": turn["value"]})
    others = {key: value[key] for key in value.keys() - {"conversations", "system"}}
    start = [{"role": "system", "content": system}] if system else []
    return {**others, "messages": [*start, *messages]}


def _is_pair(value: Any) -> bool:
    pair = isinstance(value, Sequence) and len(value) == 2 and not isinstance(value, str)
    return pair and all(isinstance(each, str) for each in value)


def render_layout(conversation: Conversation, layout: Layout) -> dict[str, Any]:
    """Return a conversation as a line of a layout.

    OpenAI's layout is also ours. In the others an answer's calculations become text.

    Raises:
        UsageError: it ends with a question, which Alpaca's layout cannot hold.
    """
    if layout == "openai":
        return {"messages": conversation["messages"]}
    messages = [(m["role"], _mark_calculations(m["content"])) for m in conversation["messages"]]
    if layout == "sharegpt":
        names = {"user": "human", "assistant": "gpt"}
        turns = [{"from": names.get(role, role), "value": text} for role, text in messages]
        return {"conversations": turns}
    system = [text for role, text in messages if role == "system"]
    texts = [text for role, text in messages if role != "system"]
    if len(texts) % 2:
        raise UsageError(
            f"no answer follows {texts[-1][:60]!r}, which Alpaca's layout cannot hold: choose "
            "another --layout"
        )
    *history, (question, answer) = zip(texts[::2], texts[1::2], strict=True)
    line: dict[str, Any] = {"instruction": question, "input": "", "output": answer}
    line |= {"system": system[0]} if system else {}
    return line | ({"history": [list(pair) for pair in history]} if history else {})


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Write conversations or other values as JSON, one per line, atomically."""
    lines = (f"{json.dumps(value, ensure_ascii=False)}\n".encode() for value in values)
    write_bytes(path, b"".join(lines))


def _mark_calculations(content: str | list[dict[str, str]]) -> str:
    """Return a message as text; its calculations are marked as GSM8K does, <<2*3=6>>."""
    text = ""
    for each in [part("text", content)] if isinstance(content, str) else content:
        if each["type"] == "python_output":
            text = f"{text.removesuffix('>>')}{each['text']}>>"
        else:
            text += f"<<{each['text']}=>>" if each["type"] == "python" else each["text"]
    return text
