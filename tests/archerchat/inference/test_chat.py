"""A conversation: what the model is shown, what is kept, and what a full context leaves out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from archerchat.errors import UsageError
from archerchat.inference.chat import ChatSession, Turn, build_answer_request, generate_texts
from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.tools import Piece
from archerchat.tasks.conversation import check_conversation
from archerchat.tokenizer.chat_format import render_for_completion

SCRIPT = (
    "<|assistant_start|>",
    *("So ", "<|python_start|>", "6*7", "<|python_end|>"),
    *("<|output_end|>", "####", "42", "<|assistant_end|>"),
)
SAID = "So [6*7 = 42]####42"


@pytest.fixture
def session(scripted: Callable[[Sequence[str]], Any]) -> ChatSession:
    speaker = scripted(SCRIPT)
    params = SamplingParams(32, temperature=0.0)
    return ChatSession(Engine(speaker.model, max_batch=1), speaker.tokenizer, params)


def say(session: ChatSession, message: str) -> list[tuple[str, str]]:
    """Return the parts of the answer."""
    parts: list[tuple[str, str]] = []
    for piece in session.answer(message):
        if piece.starts:
            parts.append((piece.type, ""))
        parts[-1] = (piece.type, parts[-1][1] + piece.text)
    return parts


def prompts_of(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Collect the prompts that the engine is given from here on."""
    seen: list[list[int]] = []
    stream = session.engine.stream

    def watched(requests: Any) -> Any:
        seen.extend(list(request.prompt) for request in requests)
        return stream(requests)

    monkeypatch.setattr(session.engine, "stream", watched)
    return seen


def test_answers_end_at_the_assistants_end_or_a_new_document(session: ChatSession) -> None:
    tokenizer = session.tokenizer
    request = build_answer_request(tokenizer, [1], SamplingParams(stop_token_ids=(7,)))
    ends = tokenizer.special_id("<|assistant_end|>"), tokenizer.bos_id
    assert request.params.stop_token_ids == (*ends, 7)


def test_an_answer_comes_in_parts_with_the_calculators_result(session: ChatSession) -> None:
    parts = say(session, "6 times 7?")
    assert parts == [
        ("text", "So "),
        ("python", "6*7"),
        ("python_output", "42"),
        ("text", "####42"),
    ]
    assert session.completion.finish_reason == "stop"


def test_prompts_are_those_of_training(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.system = "Be brief."
    prompts = prompts_of(session, monkeypatch)
    for message in ("one", "two", "<|assistant_start|> is no token here"):
        expected = session.to_conversation()["messages"] + [  # type: ignore[operator]
            {"role": "user", "content": message}
        ]
        say(session, message)
        assert prompts[-1] == render_for_completion(session.tokenizer, {"messages": expected})
    assert len(session.turns) == 3


def test_the_oldest_turns_are_left_out_when_the_context_is_full(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.system = "Sys."
    prompts = prompts_of(session, monkeypatch)
    for number in range(6):
        say(session, f"message {number}")
    assert session.forgotten > 0
    kept = session.turns[session.forgotten : -1]
    assert 0 < len(kept) < 5
    text = session.tokenizer.decode(prompts[-1])
    assert text.startswith(f"<|bos|><|user_start|>Sys.\n\n{kept[0].message}<|user_end|>")
    assert "message 0" not in text
    assert len(prompts[-1]) + 32 <= session.engine.max_length
    assert len(session.turns) == 6  # nothing is lost to /save
    session.clear()
    say(session, "new")
    assert session.forgotten == 0


def test_a_message_without_room_is_refused_and_nothing_changes(session: ChatSession) -> None:
    say(session, "first")
    before = list(session.turns)
    with pytest.raises(UsageError, match=r"takes \d+ tokens and the context has 128"):
        session.answer("long " * 100)
    with pytest.raises(UsageError, match="nothing to answer"):
        session.answer("  ")
    assert session.turns == before
    assert say(session, "second")


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_went(session: ChatSession) -> None:
    pieces = session.answer("first")
    assert next(pieces) == Piece("text", "S", True)
    pieces.close()  # type: ignore[attr-defined]
    assert session.tokenizer.decode(session.turns[0].answer) == "S"
    assert len(say(session, "second")) == 4  # the engine is free again
    assert len(session.turns) == 2


def test_a_stop_string_ends_an_answer_and_is_not_shown(session: ChatSession) -> None:
    session.params = replace(session.params, stop=("##4",))
    assert say(session, "6 times 7?")[-1] == ("text", "##")
    assert session.completion.finish_reason == "stop"
    answer = session.to_conversation()["messages"][1]  # type: ignore[index]
    assert answer["content"][-1] == {"type": "text", "text": "##"}


def test_params_are_checked_before_they_are_taken(session: ChatSession) -> None:
    session.params = replace(session.params, temperature=0.5, top_k=None)
    assert (session.params.temperature, session.params.top_k) == (0.5, None)
    with pytest.raises(UsageError, match="--temperature is -1"):
        session.params = replace(session.params, temperature=-1.0)
    with pytest.raises(UsageError, match="--top-k is 0"):
        session.params = replace(session.params, top_k=0)
    assert (session.params.temperature, session.params.top_k) == (0.5, None)


def test_the_same_seed_says_the_same_again_but_not_in_the_next_turn(session: ChatSession) -> None:
    session.engine.model.unembedding.weight.mul_(0.2)  # nothing is certain any more
    session.params = replace(session.params, temperature=1.0, top_k=None, max_new_tokens=8)
    answers = []
    for _ in range(2):
        session.clear()
        for _ in range(2):
            say(session, "hello")
        answers.append([turn.answer for turn in session.turns])
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1]


def test_a_saved_conversation_can_be_learned_from(session: ChatSession) -> None:
    session.system = "Be brief."
    say(session, "6 times 7?")
    session.turns.append(Turn("stopped at once", ()))
    line = json.dumps(session.to_conversation())
    conversation = check_conversation(json.loads(line))
    assert [message["role"] for message in conversation["messages"]] == [
        *("system", "user", "assistant")
    ]
    assert conversation["messages"][2]["content"][1] == {"type": "python", "text": "6*7"}


def test_texts_of_prompts(session: ChatSession) -> None:
    tokenizer = session.tokenizer
    prompts = [tokenizer.encode("6"), tokenizer.encode("4")]
    params = SamplingParams(2, temperature=0, num_samples=2)
    texts = generate_texts(session.engine, tokenizer, prompts, params)
    assert texts == ["*7", "*7", "2<|assistant_end|>", "2<|assistant_end|>"]
