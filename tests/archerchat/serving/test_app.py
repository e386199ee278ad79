"""What the API answers, against the engine's own words."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from archerchat import load
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Event, Request
from archerchat.serving.answers import Answer, ChatAnswer, ResponsesAnswer
from archerchat.serving.guard import APIError
from archerchat.serving.requests import ChatRequest
from archerchat.serving.worker import Stream
from archerchat.tokenizer.chat_format import render_conversation, render_for_completion

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GREEDY = {"temperature": 0, "max_tokens": 6}


def ask(client: TestClient, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(client: TestClient, path: str, **body: Any) -> list[Any]:
    response = client.post(path, json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def model(served_home: Any) -> Any:
    return load("tiny", device="cpu", dtype="float32", home=served_home.root)


def test_a_completion_is_what_generate_says_whole_and_streamed(
    client: TestClient, model: Any
) -> None:
    expected = model.generate("ab", "cd", max_new_tokens=6, temperature=0)
    body = {"model": "tiny:base", "prompt": ["ab", "cd"], **GREEDY}
    whole = ask(client, TEXT, **body)
    assert [choice["text"] for choice in whole["choices"]] == expected
    assert {choice["finish_reason"] for choice in whole["choices"]} == {"length"}
    assert whole["usage"]["completion_tokens"] == 12
    assert whole["timings"]["predicted_n"] == 12
    chunks = stream(client, TEXT, **body, stream_options={"include_usage": True})
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == expected
    assert chunks[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    ids = [model.loaded.tokenizer.bos_id, *model.loaded.tokenizer.encode("cd")]
    assert ask(client, TEXT, model="tiny", prompt=ids, **GREEDY)["choices"][0]["text"] in expected


def test_samples_differ_and_a_seed_repeats_them(client: TestClient) -> None:
    body = {"prompt": "ab", "n": 3, "max_tokens": 8, "seed": 1}
    first = [choice["text"] for choice in ask(client, TEXT, **body)["choices"]]
    assert len(set(first)) > 1
    assert first == [choice["text"] for choice in ask(client, TEXT, **body)["choices"]]
    assert first != [
        choice["text"] for choice in ask(client, TEXT, **body | {"seed": 2})["choices"]
    ]


def test_a_stop_string_ends_a_completion_across_tokens(client: TestClient, model: Any) -> None:
    (text,) = model.generate("ab", max_new_tokens=12, temperature=0)
    stop = text[len(text) // 2 - 1 : len(text) // 2 + 3]
    body = {"model": "tiny:base", "prompt": "ab", "temperature": 0, "max_tokens": 12, "stop": stop}
    (choice,) = ask(client, TEXT, **body)["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    streamed = [chunk["choices"][0]["text"] for chunk in stream(client, TEXT, **body)]
    assert "".join(streamed) == choice["text"]


def test_a_conversation_is_answered_continued_and_templated(client: TestClient, model: Any) -> None:
    tokenizer = model.loaded.tokenizer
    messages = [{"role": "developer", "content": "be"}, user("ab")]
    conversation = {"messages": [{"role": "system", "content": "be"}, user("ab")]}
    template = ask(client, "/apply-template", messages=messages)
    assert template["tokens"] == render_for_completion(tokenizer, conversation)
    raw = ask(client, TEXT, model="tiny:base", prompt=template["tokens"], **GREEDY)["choices"][0]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages[1] = {"role": "user", "content": parts}  # type: ignore[dict-item]
    answer = ask(client, CHAT, messages=messages, **GREEDY)
    assert answer["choices"][0]["message"]["content"] == raw["text"]
    assert answer["usage"]["prompt_tokens"] == len(template["tokens"])
    chunks = stream(client, CHAT, messages=messages, **GREEDY)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(deltas) == raw["text"]
    assert "timings" in chunks[-1]
    prefill = [user("ab"), {"role": "assistant", "content": "cd"}]
    ids, _ = render_conversation(tokenizer, {"messages": prefill})
    assert ask(client, "/apply-template", messages=prefill)["tokens"] == ids[:-1]


def test_responses_say_what_a_chat_says(client: TestClient) -> None:
    messages = [{"role": "system", "content": "be"}, user("ab")]
    chat = ask(client, CHAT, messages=messages, **GREEDY)
    parts = [{"type": "input_text", "text": "ab"}]
    body = {
        "instructions": "be",
        "input": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_output_tokens": 6,
    }
    whole = ask(client, "/v1/responses", **body)
    (part,) = whole["output"][0]["content"]
    assert part["text"] == chat["choices"][0]["message"]["content"]
    assert (whole["status"], whole["usage"]["output_tokens"]) == ("incomplete", 6)
    text = client.post("/v1/responses", json={**body, "stream": True}).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == part["text"]
    assert events[-1]["type"] == "response.incomplete"
    refused = client.post("/v1/responses", json={**body, "previous_response_id": "x"})
    assert refused.json()["error"]["param"] == "previous_response_id"


def show(kind: type[Answer], tokenizer: Any, arriving: list[Any]) -> tuple[list[str], Answer]:
    """Return what a stream shows of events that come together, or of errors; and its answer."""
    stream = Stream(Any, Any, [Request([1], SamplingParams())])  # type: ignore[arg-type]
    served: Any = SimpleNamespace(name="tiny", tokenizer=tokenizer)
    body = ChatRequest.model_validate({"messages": [user("ab")], "stream": True})
    answer, seen = kind(served, stream, body), []

    async def arrive() -> AsyncIterator[dict[int, list[Event]]]:
        for found in arriving:
            seen.append("waited")
            if isinstance(found, Exception):
                raise found
            stream.said[0] += found
            stream.open_samples -= any(event.finish_reason is not None for event in found)
            yield {0: found} if found else {}

    async def listen() -> None:
        async for piece in answer.body_iterator:
            assert isinstance(piece, bytes)
            seen.append(piece.decode())

    stream.arriving = arrive  # type: ignore[method-assign, assignment]
    asyncio.run(listen())
    return seen, answer


def test_a_response_begins_before_its_first_token_and_numbers_its_failure(model: Any) -> None:
    arriving = [[], APIError("the model failed", status=500)]
    seen, _ = show(ResponsesAnswer, model.loaded.tokenizer, arriving)
    begun, waited, ping, again, failed = seen
    assert begun.startswith("event: response.created\n")
    assert waited == again == "waited"
    assert ping == ": still at work\n\n"
    assert json.loads(failed.removeprefix("event: error\ndata: ")) == {
        "type": "error",
        "message": "the model failed",
        "code": "server_error",
        "param": None,
        "sequence_number": 3,
    }


SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 9},
        "b": {"enum": ["x", "y"]},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}


def test_a_schema_is_kept_to(client: TestClient) -> None:
    """The model says nothing of sense, yet each sample is JSON that fits, whole and streamed."""
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    body = {"messages": [user("ab")], "max_tokens": 40, "temperature": 2, "seed": 1, "n": 3}
    choices = ask(client, CHAT, **body, response_format=wanted)["choices"]
    for choice in choices:
        found = json.loads(choice["message"]["content"])
        assert found["a"] in range(10)
        assert found["b"] in ("x", "y")
        assert choice["finish_reason"] == "stop"
    texts = ["", "", ""]
    for chunk in stream(client, CHAT, **body, response_format=wanted):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [choice["message"]["content"] for choice in choices]
    anything = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}
    (choice,) = ask(client, CHAT, messages=[user("ab")], max_tokens=40, response_format=anything)[
        "choices"
    ]
    assert choice["message"]["content"][0] in '{["-0123456789tfn'
    (choice,) = ask(
        client, CHAT, messages=[user("ab")], max_tokens=40, response_format={"type": "json_object"}
    )["choices"]
    assert choice["message"]["content"].startswith("{")
    body = {"input": "ab", "text": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    (part,) = ask(client, "/v1/responses", **body)["output"][0]["content"]
    assert json.loads(part["text"])["b"] in ("x", "y")


def test_fields_of_the_other_chat_api_change_nothing(client: TestClient) -> None:
    own = {"input": "ab", "temperature": 0, "max_output_tokens": 6}
    other = {
        "max_tokens": 1,
        "max_completion_tokens": 1,
        "text": {"type": "json_object"},
        "response_format": {"type": "json_schema"},
    }
    plain, both = (ask(client, "/v1/responses", **own, **more) for more in ({}, other))
    assert plain["usage"]["output_tokens"] == 6
    assert [each["content"] for each in plain["output"]] == [
        each["content"] for each in both["output"]
    ]
    form = {"type": "text", "format": {"type": "json_object"}}
    plain, both = (
        ask(client, CHAT, messages=[user("ab")], **GREEDY, **more)
        for more in ({}, {"response_format": form})
    )
    assert plain["choices"] == both["choices"]


def test_the_seeds_path_streams_by_itself(client: TestClient) -> None:
    response = client.post("/chat/completions", json={"messages": [user("ab")], "max_tokens": 2})
    assert response.text.rstrip().endswith("data: [DONE]")


def test_a_second_turn_does_not_run_the_first_again(client: TestClient) -> None:
    first = [user("abcdefghij klmnop abcdefghij")]
    answer = ask(client, CHAT, messages=first, **GREEDY)["choices"][0]["message"]["content"]
    usage = ask(client, CHAT, messages=first, **GREEDY)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]
    second = [*first, {"role": "assistant", "content": answer}, user("a")]
    again = ask(client, CHAT, messages=second, max_tokens=1)["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]


def test_old_turns_make_room_or_are_refused(client: TestClient) -> None:
    turns = [user("abcd efgh"), {"role": "assistant", "content": "abcdefgh"}] * 6
    messages = [{"role": "system", "content": "k"}, *turns, user("last")]
    response = client.post(CHAT, json={"messages": messages, "max_tokens": 4})
    dropped = response.json()["usage"]["dropped_messages"]
    assert 0 < dropped < 12
    assert dropped % 2 == 0
    assert response.headers["archerchat-dropped-messages"] == str(dropped)
    kept = [messages[0], *messages[1 + dropped :]]
    whole = ask(client, CHAT, messages=kept, max_tokens=4, truncation="disabled")
    assert whole["usage"]["prompt_tokens"] == response.json()["usage"]["prompt_tokens"]
    refused = client.post(CHAT, json={"messages": messages, "truncation": "disabled"})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_log_probabilities_of_prompt_and_answer(client: TestClient, model: Any) -> None:
    """What lm-eval asks for; the scores are the model's own."""
    tokenizer, engine = model.loaded.tokenizer, model.engine
    rows = [[tokenizer.bos_id, *tokenizer.encode("ab cd")], [5, 6, 7]]
    body = {"model": "tiny:base", "prompt": rows, "logprobs": 2, "echo": True, "temperature": 0}
    answer = ask(client, TEXT, **body, max_tokens=1)
    for choice, row in zip(answer["choices"], rows, strict=True):
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None
        assert len(found["tokens"]) == len(row) + 1
        logprobs = engine.model(torch.tensor([row]))[0].log_softmax(dim=-1)
        expected = [float(logprobs[i, token]) for i, token in enumerate(row[1:])]
        assert found["token_logprobs"][1 : len(row)] == pytest.approx(expected, abs=1e-4)
        best = [max(top.values()) for top in found["top_logprobs"][1 : len(row)]]
        assert best == pytest.approx(logprobs[:-1].amax(dim=-1).tolist(), abs=1e-4)
    scored = ask(client, TEXT, **body, max_tokens=0)
    assert [len(choice["logprobs"]["tokens"]) for choice in scored["choices"]] == [len(rows[0]), 3]
    assert scored["choices"][0]["text"] == "<|bos|>ab cd"
    streamed = stream(client, TEXT, **body, max_tokens=0)
    assert [chunk["choices"][0] for chunk in streamed] == scored["choices"]
    (chunk,) = stream(client, TEXT, prompt="ab", max_tokens=0)
    assert chunk["choices"][0]["finish_reason"] == "length"
    text = ask(client, TEXT, **body | {"prompt": "ab cd", "max_tokens": 0})["choices"][0]
    assert text["text"] == "ab cd"
    assert text["logprobs"]["token_logprobs"] == pytest.approx(
        scored["choices"][0]["logprobs"]["token_logprobs"][1:]
    )
    body = {"messages": [user("ab")], "logprobs": True, "top_logprobs": 2, **GREEDY}
    entries = ask(client, CHAT, **body)["choices"][0]["logprobs"]["content"]
    assert len(entries) == 6
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in entries)
    assert bytes(entries[0]["bytes"]).decode(errors="replace") == entries[0]["token"]


def test_text_becomes_tokens_and_back(client: TestClient, model: Any) -> None:
    found = ask(client, "/tokenize", content="ab <|bos|>", add_special=True)
    tokenizer = model.loaded.tokenizer
    assert found["tokens"] == [tokenizer.bos_id, *tokenizer.encode("ab <|bos|>")]
    assert ask(client, "/detokenize", tokens=found["tokens"][1:])["content"] == "ab <|bos|>"


def test_models_stats_and_metrics(client: TestClient) -> None:
    ask(client, TEXT, model="tiny:base", prompt="ab", max_tokens=2)
    models = client.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in models] == ["tiny:sft", "tiny:base"]
    assert models[1].items() >= {"stage": "base", "step": 4, "depth": 2, "context": 64}.items()
    assert models[1]["val_bpb"] > 0
    assert client.get("/v1/models/tiny:base").json()["id"] == "tiny:base"
    stats = client.get("/stats").json()
    assert stats["generated_tokens_total"] > 0
    assert stats["samples_in_work"] == stats["rows"] == 0
    assert "tiny:base" in stats["models"]
    assert "archerchat_rows 0\n" in client.get("/metrics").text
    assert client.get("/health").json() == {"status": "ok"}


def test_models_that_were_trained_since_are_offered(
    served_home: Any, serve: Any, tmp_path: Path
) -> None:
    home = served_home.copy(tmp_path / "home")
    base, tuned, more = (home.stage_dir(stage) for stage in ("base", "sft", "rl"))
    tuned.unlink() if tuned.is_symlink() else shutil.rmtree(tuned)
    client = serve(home)

    def names() -> list[str]:
        return [card["id"] for card in client.get("/v1/models").json()["data"]]

    assert names() == ["tiny:base"]
    assert client.get("/v1/models/tiny:sft").status_code == 404
    shutil.copytree(base, tuned)
    ask(client, TEXT, model="tiny:sft", prompt="ab", max_tokens=2)
    shutil.copytree(base, more)
    assert names() == ["tiny:base", "tiny:sft", "tiny:rl"]  # the default stays
    shutil.rmtree(more)
    assert names() == ["tiny:base", "tiny:sft"]
    (max(base.glob("tiny/step_*")) / "meta.json").write_text("damaged")
    shutil.copytree(base, more)
    assert names() == ["tiny:sft"]
    named = serve(home, model=("tiny:sft",))
    assert len(named.get("/v1/models").json()["data"]) == 1


def test_calculator_calls_are_a_field_of_their_own(scripted: Any) -> None:
    words = [
        "a",
        "<|python_start|>",
        "6*7",
        "<|python_end|>",
        "<|output_start|>",
        "42",
        "<|output_end|>",
        "b",
    ]
    found = scripted(["a", "b"])
    events = [Event(0, 0, token) for token in found.ids(words)]
    end = Event(0, 0, None, finish_reason="stop")
    arriving = [[events[0]], [events[1]], [events[2]], events[3:], [end]]  # together, or apart
    seen, answer = show(ChatAnswer, found.tokenizer, arriving)
    events = "".join(seen).split("data: ")[1:-1]
    chunks = [json.loads(event.partition("\n")[0]) for event in events]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "ab"
    message = answer.whole()["choices"][0]["message"]
    assert message["content"] == "ab"
    assert [part["text"] for part in message["parts"]] == ["a", "6*7", "42", "b"]
    shown = [part for delta in deltas for part in delta.get("parts", [])]
    for kind, text in (("text", "b"), ("python", "6*7"), ("python_output", "42")):
        assert "".join(part["text"] for part in shown if part["type"] == kind) == text


def test_two_calls_in_a_row_are_two_parts_of_a_stream(scripted: Any) -> None:
    words = ["<|python_start|>", "6*", "<|python_end|>", "<|python_start|>", "7*", "<|python_end|>"]
    found = scripted(["a", "b"])
    events = [Event(0, 0, token) for token in found.ids(words)]
    arriving = [events, [Event(0, 0, None, finish_reason="stop")]]
    (_, first, *_), _ = show(ChatAnswer, found.tokenizer, arriving)
    delta = json.loads(first[6:])["choices"][0]["delta"]
    assert [(part["text"], part["starts"]) for part in delta["parts"]] == [
        ("6", True),
        ("*", False),
        ("7", True),
        ("*", False),
    ]
