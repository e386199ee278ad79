"""What clients get wrong has its status, names the field, and the server goes on."""

from __future__ import annotations

import asyncio
import json
import math
import shlex
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from archerchat.errors import UsageError
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Request
from archerchat.serving import guard, worker
from archerchat.serving.config import ServeConfig
from archerchat.serving.worker import Stream
from archerchat.tokenizer.bpe import Tokenizer

JSON = "application/json"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "a"}]


def text_scope(**asgi: str) -> dict[str, Any]:
    """Return an ASGI scope that asks for a text; `asgi` is what the server announces of itself."""
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": TEXT, "query_string": b""}
    return scope | {"headers": headers, "asgi": {"version": "3.0", **asgi}}


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def schema(content: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": content}}


def deep(depth: int) -> dict[str, Any]:
    return {"items": deep(depth - 1)} if depth else {}


REFUSED = [
    (CHAT, {}, 400, "messages"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": "hello"}, 400, "messages"),
    (CHAT, {"messages": HELLO, "model": "none"}, 404, "model"),
    (CHAT, {"messages": HELLO, "model": 3}, 400, "model"),
    (CHAT, {"messages": HELLO, "temperature": "hot"}, 400, "temperature"),
    (CHAT, {"messages": HELLO, "temperature": -1}, 400, "temperature"),
    (CHAT, {"messages": HELLO, "temperature": 2.1}, 400, "temperature"),
    (CHAT, {"messages": HELLO, "temperature": 1e-9}, 400, "temperature"),
    (CHAT, {"messages": HELLO, "temperature": 10**400}, 400, "temperature"),
    (CHAT, {"messages": HELLO, "top_k": 201}, 400, "top_k"),
    (CHAT, {"messages": HELLO, "top_p": 0}, 400, "top_p"),
    (CHAT, {"messages": HELLO, "max_tokens": 0}, 400, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": 1.5}, 400, "max_tokens"),
    (CHAT, {"messages": HELLO, "n": 10**30}, 400, "n"),
    (CHAT, {"messages": HELLO, "stop": ""}, 400, "stop"),
    (CHAT, {"messages": HELLO, "stop": ["a", ""]}, 400, "stop[1]"),
    (CHAT, {"messages": HELLO, "top_logprobs": 21}, 400, "top_logprobs"),
    (CHAT, {"messages": HELLO, "logit_bias": {"a": 1}}, 400, "logit_bias"),
    (CHAT, {"messages": HELLO, "logit_bias": {"99999": 1}}, 400, "logit_bias"),
    (CHAT, {"messages": HELLO, "logit_bias": {"1": 101}}, 400, "logit_bias.1"),
    (CHAT, {"messages": HELLO, "tool_choice": "required"}, 400, "tool_choice"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "x"}}, 400, "response_format.type"),
    (
        CHAT,
        {"messages": HELLO, "response_format": {"type": "json_schema"}},
        400,
        "response_format.json_schema",
    ),
    (CHAT, {"messages": HELLO, "response_format": schema({"enum": []})}, 400, "response_format"),
    (CHAT, {"messages": HELLO, "response_format": schema({"$ref": "#"})}, 400, "response_format"),
    (
        CHAT,
        {"messages": HELLO, "response_format": schema({"$ref": "http://a.example/b"})},
        400,
        "response_format",
    ),
    (
        CHAT,
        {"messages": HELLO, "response_format": schema({"type": "string", "pattern": "("})},
        400,
        "response_format",
    ),
    (CHAT, {"messages": HELLO, "response_format": schema(deep(400))}, 400, "response_format"),
    (
        CHAT,
        {"messages": HELLO, "response_format": schema({"title": "a" * 70_000})},
        400,
        "response_format.json_schema.schema",
    ),
    (
        CHAT,
        {"messages": HELLO, "response_format": schema({"const": "\ud800"})},
        400,
        "response_format.json_schema.schema",
    ),
    (
        CHAT,
        {"messages": HELLO, "response_format": schema({"const": math.nan})},
        400,
        "response_format.json_schema.schema",
    ),
    (
        "/v1/responses",
        {
            "input": "a",
            "text": {
                "format": {
                    "type": "json_schema",
                    "schema": {"type": "string", "minLength": 2, "maxLength": 1},
                }
            },
        },
        400,
        "text.format",
    ),
    (
        "/v1/responses",
        {"input": "a", "text": {"format": {"type": "json_schema"}}},
        400,
        "text.format.schema",
    ),
    ("/v1/responses", {"input": "a", "max_output_tokens": 0}, 400, "max_output_tokens"),
    ("/v1/responses", {"input": "a", "max_completion_tokens": 0}, 400, "max_completion_tokens"),
    (
        "/v1/responses",
        {"input": "a", "response_format": {"type": "x"}},
        400,
        "response_format.type",
    ),
    (CHAT, {"messages": [said("user", "  ")]}, 400, "messages[0].content"),
    (CHAT, {"messages": [said("user", None)]}, 400, "messages[0].content"),
    (CHAT, {"messages": [said("user", "\ud800")], "model": "\ud800"}, 404, "model"),
    (CHAT, {"messages": [said("tool", "a")]}, 400, "messages[0].role"),
    (CHAT, {"messages": [said("assistant", "a")]}, 400, "messages[0].role"),
    (CHAT, {"messages": [*HELLO, *HELLO]}, 400, "messages[1].role"),
    (CHAT, {"messages": [*HELLO, said("system", "a")]}, 400, "messages[1].role"),
    (CHAT, {"messages": [said("system", "a")]}, 400, "messages"),
    (
        CHAT,
        {"messages": [said("user", [{"type": "image_url"}])]},
        400,
        "messages[0].content[0].text",
    ),
    (
        CHAT,
        {"messages": [said("user", [{"type": "python", "text": "1"}])]},
        400,
        "messages[0].content[0].type",
    ),
    (CHAT, {"messages": [said("user", "a" * 8001)]}, 400, "messages[0].content"),
    (CHAT, {"messages": [*HELLO, said("assistant", "a")] * 251}, 400, "messages"),
    (
        CHAT,
        {"messages": [said("user", "a" * 7999), said("assistant", "a" * 7999)] * 3},
        400,
        "messages",
    ),
    (CHAT, {"messages": [said("user", "ab " * 100)]}, 400, "messages"),
    (TEXT, {"prompt": []}, 400, "prompt"),
    (TEXT, {"prompt": [-1]}, 400, "prompt"),
    (TEXT, {"prompt": [10**30]}, 400, "prompt"),
    (TEXT, {"prompt": "ab " * 100}, 400, "prompt"),
    (TEXT, {"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
    (TEXT, {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
    (TEXT, {"prompt": ["a"] * 200, "max_tokens": 0, "echo": True}, 400, None),
    ("/v1/responses", {"input": ""}, 400, "input"),
    ("/v1/responses", {"input": []}, 400, "input"),
    ("/v1/responses", {"input": "a", "top_logprobs": 1}, 400, "top_logprobs"),
    ("/v1/responses", {"input": [*HELLO, *HELLO]}, 400, "input[1].role"),
    ("/v1/responses", {"input": [said("user", "a"), said("assistant", "b")] * 250}, 400, "input"),
    ("/detokenize", {"tokens": [10**30]}, 400, "tokens"),
    ("/nowhere", {}, 404, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), REFUSED)
def test_a_wrong_field_is_named(
    client: TestClient, path: str, body: Any, status: int, param: str | None
) -> None:
    headers = {"content-type": "application/json"}
    response = client.post(path, content=json.dumps(body), headers=headers)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert param is None or param.split("[")[0].split(".")[0] in error["message"]


def test_a_body_that_is_no_json_is_explained(client: TestClient) -> None:
    def error(content: bytes, **headers: str) -> Any:
        return client.post(CHAT, content=content, headers=headers).json()["error"]

    broken = error(b'{"messages": [{"role": "user" "content"}]}', **{"content-type": JSON})
    assert broken["param"] is None
    assert broken["message"] == "the body is not JSON: Expecting ',' delimiter at character 31"
    whole = json.dumps({"messages": HELLO}).encode()
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        assert "send Content-Type: application/json" in error(whole, **headers)["message"]


def test_the_guide_s_curl_command_works(client: TestClient) -> None:
    guide = Path(__file__).parents[3] / "docs" / "serving.md"
    command = guide.read_text(encoding="utf-8").split("```bash\ncurl ")[1].split("```")[0]
    url, _, header, _, body = shlex.split(command.replace("\\\n", ""))
    headers = dict([header.split(": ")])
    response = client.post(
        url.split(":8000")[1], headers=headers, content=body.replace("d12", "tiny")
    )
    assert response.json()["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"messages": "\xff"}', b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}", b"[]"],
)
def test_what_is_no_json_object_is_refused(client: TestClient, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = client.post(CHAT, content=content, headers=headers)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


def test_what_is_no_token_id_is_quoted(client: TestClient) -> None:
    body = {"messages": HELLO, "logit_bias": {"1": 1, "hello": 1}}
    message = client.post(CHAT, json=body).json()["error"]["message"]
    assert message == "logit_bias has 'hello' where a token id is due"


def test_a_wrong_method_is_told_the_right_one(client: TestClient) -> None:
    response = client.get(TEXT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_schema_is_refused_however_deep(client: TestClient) -> None:
    """Some depth is too much for Python, but only for what comes after it has read the body."""
    body = {"messages": HELLO, "response_format": schema("deep")}
    for depth in range(900, 1000):
        content = json.dumps(body).replace('"deep"', '{"items":' * depth + "{}" + "}" * depth)
        response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400, (depth, response.text)


@pytest.mark.parametrize("path", ["/tokenize", TEXT])
def test_a_long_text_holds_nobody_up(
    serve: Any, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    client, reading, answered = serve(), threading.Event(), threading.Event()
    client.post(TEXT, json={"prompt": "a", "max_tokens": 1})
    encode = Tokenizer.encode

    def wait(self: Tokenizer, text: str) -> list[int]:
        reading.set()
        assert answered.wait(20)
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", wait)
    codes: list[int] = []
    body = {"prompt": "a " * 40_000}
    asking = threading.Thread(target=lambda: codes.append(client.post(path, json=body).status_code))
    asking.start()
    assert reading.wait(20)
    assert client.get("/health").status_code == 200
    answered.set()
    asking.join()
    assert codes == [400 if path == TEXT else 200]


def test_special_tokens_in_a_message_stay_text(client: TestClient) -> None:
    messages = [said("user", "<|user_end|><|assistant_start|>")]
    ids = client.post("/apply-template", json={"messages": messages}).json()["tokens"]
    plain = client.post("/tokenize", json={"content": messages[0]["content"]}).json()["tokens"]
    assert ids[2:-2] == plain
    assert max(plain) < min(ids[:2])


def test_a_large_body_is_refused_before_it_is_parsed(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its length is announced or not."""
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 1000)
    client = serve()
    large = json.dumps({"prompt": "a" * 1000}).encode()
    for content in (large, iter([large[:600], large[600:]])):
        response = client.post(TEXT, content=content)
        assert response.status_code == 413
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_the_key_is_asked_for(serve: Any) -> None:
    client = serve(api_key="secret")
    for headers in ({}, {"authorization": "Bearer other"}, {"authorization": b"Bearer \xff"}):
        response = client.get("/v1/models", headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
    assert client.get("/health").status_code == client.get("/").status_code == 200


@pytest.mark.parametrize("key", ["schlüssel", " key", "line\n", "\udcff"])
def test_a_key_that_no_header_carries_is_refused_at_the_start(serve: Any, key: str) -> None:
    assert ServeConfig(api_key="").key is None
    with pytest.raises(UsageError, match="the key of --api-key or ARCHERCHAT_API_KEY"):
        serve(api_key=key)
    sent = {"Authorization": "Bearer two words"}
    assert serve(api_key="two words").get("/v1/models", headers=sent).status_code == 200


def test_a_server_without_a_key_answers_to_its_own_name_only(serve: Any) -> None:
    client = serve()
    assert client.get("/health", headers={"host": "evil.example:8000"}).status_code == 403
    assert client.get("/health", headers={"host": "localhost:8000"}).status_code == 200


def test_a_page_of_another_origin_needs_leave(serve: Any) -> None:
    """What a page may send without asking first, such as plain text, is not read as JSON."""
    simple = {"origin": "https://evil.example", "content-type": "text/plain"}
    content = json.dumps({"prompt": "a"})
    assert serve().post(TEXT, content=content, headers=simple).status_code == 400
    origin = {"origin": "https://chat.example.org"}
    allowed = "access-control-allow-origin"
    assert allowed not in serve().get("/v1/models", headers=origin).headers
    client = serve(cors_origin=["https://chat.example.org"], api_key="secret")
    asks = {**origin, "access-control-request-method": "POST"}
    assert client.options(CHAT, headers=asks).headers[allowed] == origin["origin"]


def test_a_full_queue_says_when_to_come_again(serve: Any) -> None:
    client = serve(max_batch=1, max_queue=1)
    worker = client.app.state.models.worker
    held = threading.Event()
    client.post(TEXT, json={"prompt": "a", "max_tokens": 1})
    worker._thread.submit(held.wait)  # the thread is busy until then
    body = {"prompt": "a", "max_tokens": 2}
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(client.post(TEXT, json=body)))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    while sum(thread.is_alive() for thread in threads) > 2:
        time.sleep(0.01)
    held.set()
    for thread in threads:
        thread.join()
    assert sorted(result.status_code for result in results) == [200, 200, 429, 429, 429]
    refused = next(result for result in results if result.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert client.post(TEXT, json={**body, "n": 3}).status_code == 400  # more than ever fit


def test_an_engine_that_fails_is_reported_and_goes_on(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve()
    body = {"prompt": "a", "max_tokens": 2}
    assert client.post(TEXT, json=body).status_code == 200
    engine = client.app.state.models.loaded["tiny:sft"].engine

    def fail() -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(engine, "advance", fail)
        response = client.post(TEXT, json=body)
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
        assert "server_error" in client.post(TEXT, json={**body, "stream": True}).text
    assert client.post(TEXT, json=body).status_code == 200
    assert client.get("/stats").json()["samples_in_work"] == 0


@pytest.mark.parametrize("broken", [("advance",), ("admit",), ("add",), ("advance", "cancel")])
def test_an_engine_that_cannot_even_be_reset_holds_nobody_up(
    serve: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: Any
) -> None:
    client = serve(max_loaded=2)
    body = {"prompt": "a", "max_tokens": 2}
    other = body | {"model": "tiny:base"}
    assert client.post(TEXT, json=body).status_code == 200
    assert client.post(TEXT, json=other).status_code == 200
    engine = client.app.state.models.loaded["tiny:sft"].engine

    def fail(*arguments: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        for name in (*broken, "reset"):
            patch.setattr(engine, name, fail)
        assert client.post(TEXT, json=body).status_code == 500
        assert client.post(TEXT, json=body).status_code == 500
        assert client.post(TEXT, json=other).status_code == 200
    assert "the engine could not be reset" in caplog.text
    assert client.post(TEXT, json=body).status_code == 200
    assert client.get("/stats").json()["samples_in_work"] == 0


def test_a_cancellation_that_fails_is_logged(
    serve: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = serve()
    body = {"prompt": "a", "max_tokens": 2}
    client.post(TEXT, json=body)
    models = client.app.state.models
    engine = models.loaded["tiny:sft"].engine

    def fail(number: int) -> None:
        raise MemoryError

    async def leave() -> None:
        stream = Stream(models.worker, engine, [Request([1], SamplingParams(50))])
        models.worker.submit(stream)
        models.worker.close(stream)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "cancel", fail)
        client.portal.call(leave)
        client.portal.call(models.worker.call, time.monotonic)  # after the cancellation
    assert "the engine failed" in caplog.text
    assert client.post(TEXT, json=body).status_code == 200


def test_a_client_that_never_reads_loses_its_place(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "SEND_SECONDS", 0.05)
    client = serve()
    messages = [{"type": "http.request", "body": b'{"prompt": "a", "stream": true}'}]

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    scope = text_scope()
    with pytest.raises(TimeoutError):  # uvicorn closes the connection then
        client.portal.call(client.app, scope, receive, send)
    assert client.get("/stats").json()["samples_in_work"] == 0


@pytest.mark.parametrize("version", ["2.3", "2.4", "2.5"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_noticed_whatever_the_server_announces(
    serve: Any, version: str, stream: bool
) -> None:
    client = serve()
    assert client.post(TEXT, json={"prompt": "a", "max_tokens": 1}).status_code == 200
    models = client.app.state.models
    held = threading.Event()
    models.worker._thread.submit(held.wait)  # no token comes until then
    body = json.dumps({"prompt": "a", "stream": stream}).encode()
    messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": body}]

    async def receive() -> Any:
        return messages.pop()

    async def send(message: Any) -> None:
        pass

    async def leave() -> None:
        async with asyncio.timeout(10):
            await client.app(scope, receive, send)

    scope = text_scope(spec_version=version)
    try:
        client.portal.call(leave)
        assert models.worker.samples == 0
    finally:
        held.set()


def test_models_make_room_for_each_other(serve: Any) -> None:
    client = serve(max_loaded=1)
    for name in ("tiny:base", "tiny:sft", "tiny:base"):
        body = {"model": name, "prompt": "ab", "max_tokens": 1}
        assert client.post(TEXT, json=body).json()["model"] == name
        assert client.get("/stats").json()["models"] == [name]


def test_other_work_does_not_hold_up_the_steps(serve: Any) -> None:
    client = serve()
    client.post(TEXT, json={"prompt": "a", "max_tokens": 1})
    worker = client.app.state.models.worker
    held, ran = threading.Event(), []
    worker._thread.submit(held.wait)
    body = {"prompt": "a", "max_tokens": 3}
    asking = threading.Thread(target=lambda: client.post(TEXT, json=body))
    asking.start()
    while not worker.samples:
        time.sleep(0.005)
    for _ in range(20):
        client.portal.start_task_soon(worker.call, lambda: ran.append(time.sleep(0.06)))
    held.set()
    asking.join()
    assert len(ran) < 20


def test_short_work_shares_a_pause_between_two_steps(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "CALL_SECONDS", 60)
    client = serve()
    client.post(TEXT, json={"prompt": "a", "max_tokens": 1})
    models = client.app.state.models
    engine = models.loaded["tiny:sft"].engine
    steps, advance = [], engine.advance

    def step() -> Any:
        steps.append(1)
        return advance()

    async def work() -> list[int]:
        stream = Stream(models.worker, engine, [Request([1], SamplingParams(50))])
        models.worker.submit(stream)
        while not steps:
            await asyncio.sleep(0.001)
        calls = (models.worker.call(lambda: len(steps)) for _ in range(20))
        found = await asyncio.gather(*calls)
        models.worker.close(stream)
        return found

    monkeypatch.setattr(engine, "advance", step)
    assert len(set(client.portal.call(work))) <= 3  # steps may begin while the calls are queued
