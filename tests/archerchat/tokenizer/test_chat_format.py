"""Chat rendering against the reference's goldens, and every way a conversation can be wrong."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from archerchat.errors import DataError
from archerchat.tokenizer.bpe import Tokenizer
from archerchat.tokenizer.chat_format import (
    render_conversation,
    render_for_completion,
)


def goldens(oracle_dir: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((oracle_dir / "render_goldens.json").read_text())
    return loaded


def chat(*contents: Any, system: str | None = None) -> dict[str, Any]:
    """A conversation whose messages alternate, the user's first."""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages}


def test_every_golden_renders_exactly(oracle_dir: Path, reference_tokenizer: Tokenizer) -> None:
    cases = [case for case in goldens(oracle_dir)["cases"] if "conversation" in case]
    assert len(cases) == 11
    for case in cases:
        conversation = case["conversation"]
        before = copy.deepcopy(conversation)
        rendered = render_conversation(reference_tokenizer, conversation, case["max_tokens"])
        assert rendered == (case["ids"], case["mask"]), case["name"]
        if "render_for_completion_ids" in case:
            prompt = render_for_completion(reference_tokenizer, conversation)
            assert prompt == case["render_for_completion_ids"], case["name"]
        assert conversation == before


def test_the_long_golden_is_cut_at_the_default_limit(
    oracle_dir: Path, reference_tokenizer: Tokenizer
) -> None:
    (case,) = [case for case in goldens(oracle_dir)["cases"] if "conversation_recipe" in case]
    recipe = case["conversation_recipe"]
    contents = [text * times for text, times in (recipe["user"], recipe["assistant"])]
    ids, mask = render_conversation(reference_tokenizer, chat(*contents))
    assert (len(ids), sum(mask)) == (case["n_ids"], case["mask_sum"])
    content = np.array(ids, dtype="<u4").tobytes()
    assert hashlib.sha256(content).hexdigest() == case["ids_sha256_uint32_le"]
    long_question = chat(contents[1], "yes")
    assert len(render_for_completion(reference_tokenizer, long_question)) == 2049


def test_every_golden_error_is_refused(oracle_dir: Path, reference_tokenizer: Tokenizer) -> None:
    cases = goldens(oracle_dir)["error_cases"]
    assert len(cases) == 5
    for case in cases:
        with pytest.raises(DataError, match=r"message \d"):
            render_conversation(reference_tokenizer, case["conversation"])


PARTS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "python", "python_output"]), "text": st.text(max_size=20)}
    ),
    max_size=4,
)


@given(
    contents=st.lists(st.tuples(st.text(max_size=20), PARTS | st.text(max_size=20)), min_size=1),
    system=st.none() | st.text(max_size=10),
    limit=st.integers(1, 60),
)
def test_the_mask_lies_on_what_the_assistant_writes(
    small_tokenizer: Tokenizer, contents: list[tuple[str, Any]], system: str | None, limit: int
) -> None:
    conversation = chat(*[content for turn in contents for content in turn], system=system)
    ids, mask = render_conversation(small_tokenizer, conversation, 1_000_000)
    assert len(ids) == len(mask)
    assert ids.count(small_tokenizer.bos_id) == 1

    learned = small_tokenizer.decode([i for i, trained in zip(ids, mask, strict=True) if trained])
    expected = "".join(written_by_assistant(answer) + "<|assistant_end|>" for _, answer in contents)
    assert learned == expected

    cut_ids, cut_mask = render_conversation(small_tokenizer, conversation, limit)
    assert (cut_ids, cut_mask) == (ids[:limit], mask[:limit])


def written_by_assistant(answer: str | list[dict[str, str]]) -> str:
    if isinstance(answer, str):
        return answer
    wrap = {"text": "{}", "python": "<|python_start|>{}<|python_end|>", "python_output": ""}
    return "".join(wrap[part["type"]].replace("{}", part["text"]) for part in answer)


def test_the_system_message_joins_the_first_user_message_only(small_tokenizer: Tokenizer) -> None:
    joined = render_conversation(small_tokenizer, chat("S\n\nhi", "a", "again", "b"))
    assert render_conversation(small_tokenizer, chat("hi", "a", "again", "b", system="S")) == joined


def test_a_completion_answers_a_last_message_of_the_user(small_tokenizer: Tokenizer) -> None:
    start = small_tokenizer.special_id("<|assistant_start|>")
    ids, _ = render_conversation(small_tokenizer, chat("hi", "a", "again"))
    assert render_for_completion(small_tokenizer, chat("hi", "a", "again")) == [*ids, start]
    assert render_for_completion(small_tokenizer, chat("hi", "a", "again", "ignored")) == [
        *ids,
        start,
    ]
    assert render_for_completion(small_tokenizer, chat("hi", "a", "again"), 3) == [*ids[:3], start]


BAD = [
    ({}, "at least one message"),
    ([], "at least one message"),
    ({"messages": []}, "at least one message"),
    ({"messages": "hello"}, "at least one message"),
    ({"messages": ["hello"]}, "message 0: it must be"),
    ({"messages": [{"content": "hi"}]}, "message 0: it must be"),
    ({"messages": [{"role": "system", "content": "s"}]}, "no user message follows"),
    (
        {"messages": [{"role": "system", "content": None}]},
        "message 0 (system): only text can be learned, not None",
    ),
    (
        chat("a", "b", system="s") | {"messages": [*chat("a")["messages"] * 2]},
        "message 1: the role is 'user'",
    ),
    (chat("a", None), "message 1 (assistant): content must be text or a list of parts, not None"),
    (chat("a", "b", 3), "message 2 (user): only text can be learned, not 3"),
    (chat("a", 3, system="s"), "message 2 (assistant): content must be text or a list"),
    (chat("a", ["x"]), "message 1, part 0: it must be"),
    (chat("a", [{"type": "text", "text": "b"}, {"type": "image"}]), "part 1: it must be"),
    (chat("a", [{"type": "python"}]), "part 0: it must be"),
    ({"messages": [*chat("a", "b")["messages"], {"role": "tool", "content": ""}]}, "'tool'"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
        "message 1: the role is",
    ),
]


@pytest.mark.parametrize(("conversation", "message"), BAD)
def test_bad_conversations_are_refused_by_place_and_fault(
    small_tokenizer: Tokenizer, conversation: Any, message: str
) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        render_conversation(small_tokenizer, conversation)


@pytest.mark.parametrize(
    "messages", [[], [{"role": "assistant", "content": "a"}], [{"role": "system", "content": "s"}]]
)
def test_a_completion_needs_something_to_answer(
    small_tokenizer: Tokenizer, messages: list[Any]
) -> None:
    with pytest.raises(DataError, match="message"):
        render_for_completion(small_tokenizer, {"messages": messages})
