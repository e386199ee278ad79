"""The common layouts of conversations: OpenAI's, ShareGPT's and Alpaca's.

OpenAI    {"messages": [{"role": "user", "content": "Hi"}, ...]}, or the list alone: ours too
ShareGPT  {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", ...}, ...]}
Alpaca    {"instruction": "Add them.", "input": "1, 2", "output": "3"}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from archerchat.errors import DataError, UsageError
from archerchat.files import write_bytes
from archerchat.tasks.conversation import Conversation, assistant, part, user

Layout = Literal["openai", "sharegpt", "alpaca"]
NAMES: dict[Layout, str] = {"openai": "OpenAI", "sharegpt": "ShareGPT", "alpaca": "Alpaca"}
_KEYS: dict[str, Layout] = {"conversations": "sharegpt", "instruction": "alpaca"}
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


def find_layout(value: Any) -> Layout:
    """Return the layout of a line; an unknown one counts as OpenAI's, whose checks refuse it."""
    known = isinstance(value, Mapping) and "messages" not in value
    return next((layout for key, layout in _KEYS.items() if known and key in value), "openai")


def parse_layout(value: Any, layout: Layout) -> Any:
    """Return a line as `{"messages": [...]}`, which `check_conversation` has yet to check.

    Raises:
        DataError: it cannot be read.
    """
    if layout == "openai":
        return value
    if layout == "alpaca":
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
