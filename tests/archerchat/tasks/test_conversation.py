"""Malformed conversations are refused, with the place and the remedy; good ones pass unchanged."""

from __future__ import annotations

import re
from typing import Any

import pytest

from archerchat.errors import DataError
from archerchat.tasks.conversation import assistant, check_conversation, part, text_of, user

GOOD = [user("Hi"), assistant("Hello")]


@pytest.mark.parametrize(
    "messages",
    [
        GOOD,
        [*GOOD, user("Bye"), assistant("Bye!")],
        [*GOOD, user("left open")],
        [{"role": "system", "content": "Be brief."}, *GOOD],
        [user("Hi"), assistant([part("text", "6*7="), part("python", "6*7")])],
        [user("Hi"), assistant([part("python", "print()"), part("python_output", "")])],
    ],
)
def test_good_conversations_pass_unchanged(messages: list[Any]) -> None:
    assert check_conversation(messages) == {"messages": messages}
    wrapped = {"messages": messages, "source": "a book"}
    assert check_conversation(wrapped) == wrapped


def test_what_openai_s_files_hold_is_read() -> None:
    messages = [
        {"role": "developer", "content": [part("text", "Be "), part("text", "brief.")]},
        {"role": "user", "content": [part("text", "Hi")], "name": "Ann"},
        assistant([part("text", "Hello")]),
    ]
    assert check_conversation({"messages": messages, "tools": []})["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi", "name": "Ann"},
        assistant([part("text", "Hello")]),
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "a conversation is"),
        ([], "a conversation is"),
        (None, "not None"),
        ("Hi", "not 'Hi'"),
        ({"messages": "Hi"}, "a conversation is"),
        ([user("Hi")], "no answer to learn"),
        ([{"role": "system", "content": "s"}, user("Hi")], "no answer to learn"),
        (["Hi", "Hello"], "message 0: it must be"),
        ([user("Hi"), {"role": "assistant"}], "message 1: it must be"),
        ([assistant("Hello"), user("Hi")], "message 0: the role is 'assistant' where 'user'"),
        ([*GOOD, assistant("more")], "message 2: the role is 'assistant' where 'user'"),
        ([user("Hi"), user("Hi")], "message 1: the role is 'user' where 'assistant'"),
        ([*GOOD, {"role": "system", "content": "s"}], "message 2: the role is 'system'"),
        ([user("Hi"), {"role": "bot", "content": "Hello"}], "role is 'bot' where 'assistant'"),
        ([user("Hi"), {"role": ["a"], "content": "Hello"}], r"role is \['a'\] where 'assistant'"),
        ([user(""), assistant("Hello")], r"message 0 \(user\): content is empty"),
        ([user(" \n"), assistant("Hello")], r"message 0 \(user\): content is empty"),
        ([user("Hi"), assistant("")], r"message 1 \(assistant\): content is empty"),
        ([user("Hi"), assistant([])], r"message 1 \(assistant\): content is empty"),
        ([{"role": "system", "content": ""}, *GOOD], r"message 0 \(system\): content is empty"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}, GOOD[1]],
            "only text .*image",
        ),
        ([{"role": "user", "content": []}, GOOD[1]], r"only text can be learned, not \[\]"),
        (
            [user("Hi"), {"role": "assistant", "content": None, "tool_calls": [{}]}],
            r"message 1: tool calls \(tool_calls\) are not supported",
        ),
        ({"messages": GOOD, "tools": [{}]}, r"tool calls \(tools\) are not supported"),
        ([*GOOD, {"role": "tool", "content": "7"}], "message 2: tool calls are not supported"),
        ([user("Hi"), GOOD[1] | {"weight": 0}], "message 1: messages of weight 0 are not"),
        ([user("Hi"), {"role": "assistant", "content": None}], "or a list of parts, not None"),
        ([user("Hi"), {"role": "assistant", "content": ["Hello"]}], "message 1, part 0: it must"),
        (
            [user("Hi"), {"role": "assistant", "content": [{"type": "image", "text": "x"}]}],
            "message 1, part 0: .* of the types text, python, python_output, not",
        ),
        (
            [user("Hi"), {"role": "assistant", "content": [{"text": "x"}]}],
            "part 0: .* not {'text': 'x'}",
        ),
        (
            [user("Hi"), {"role": "assistant", "content": [{"type": "text"}]}],
            "part 0: .* not {'type': 'text'}",
        ),
        ([user("Hi"), assistant([part("python", "")])], "content is empty"),
    ],
)
def test_malformed_ones_are_refused_by_place(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_conversation(value)


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(DataError) as caught:
        check_conversation("x" * 10_000)
    assert len(str(caught.value)) < 250
    assert re.search(r"x\.\.\.$", str(caught.value))


def test_what_an_answer_says_leaves_out_python() -> None:
    parts = [part("text", "a"), part("python", "1"), part("python_output", "1"), part("text", "b")]
    assert (text_of(parts), text_of("c")) == ("ab", "c")
