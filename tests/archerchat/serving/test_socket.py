"""Over a real socket: tokens come as they are made, and a client that leaves frees its row."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
import httpx

from archerchat import load
from archerchat.evals.core.bundle import OFFLINE_BUNDLE, load_bundle
from archerchat.runtime import build_runtime
from archerchat.serving import guard
from archerchat.serving.app import build_app
from archerchat.serving.config import ServeConfig

LONG = {"prompt": "ab", "max_tokens": 50, "stream": True, "logit_bias": {"351": -100}}  # no BOS


@pytest.fixture(scope="module")
def server(served_home: Any, listen: Any) -> Iterator[Any]:
    """A server on a free port, each of whose steps takes 10 ms, so that answers last."""
    app = build_app(served_home, build_runtime("cpu", "float32"), ServeConfig(max_batch=2))
    with listen(app) as address, httpx.Client(base_url="http://{}:{}".format(*address)) as client:
        client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 1}, timeout=60)
        engine = app.state.models.loaded["tiny:sft"].engine
        advance = engine.advance

        def slow() -> Any:
            time.sleep(0.01)
            return advance()

        engine.advance = slow
        yield client, address


def rows(client: httpx.Client) -> int:
    stats = client.get("/stats").json()
    return int(stats["rows"] + stats["samples_in_work"])


@contextmanager
def opened(address: Any, head: str, body: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(address, timeout=10) as found:
        found.sendall(f"{head}\r\nHost: 127.0.0.1\r\n".encode() + body)
        yield found


def test_tokens_come_as_they_are_made(server: Any) -> None:
    client, _ = server
    times, chunks = [], []
    body = LONG | {"stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
                chunks.append(json.loads(line[6:]))
    assert chunks[-1]["usage"]["completion_tokens"] == 50
    assert len(times) > 5
    assert times[-1] - times[0] > 0.3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(server: Any, stream: bool) -> None:
    client, address = server
    body = json.dumps(LONG | {"stream": stream, "n": 2}).encode()
    head = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    with opened(address, "POST /v1/completions HTTP/1.1", head + body):
        while not rows(client):
            time.sleep(0.005)
    left = time.monotonic()
    while rows(client):
        time.sleep(0.005)
    assert time.monotonic() - left < 0.3  # the answer would take another 0.5 s


def test_slow_and_silent_clients_hold_nobody_up(server: Any) -> None:
    """Headers that never end, a body that never comes, an answer that is never read."""
    client, address = server
    body = json.dumps(LONG).encode()
    head = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    with (
        opened(address, "POST /v1/completions HTTP/1.1"),
        opened(address, "POST /v1/completions HTTP/1.1", head + body[:5]),
        opened(address, "POST /v1/completions HTTP/1.1", head + body),
    ):
        answer = client.post("/v1/completions", json=LONG | {"stream": False})
        assert answer.json()["usage"]["completion_tokens"] == 50
        assert client.get("/health").status_code == 200


def test_requests_that_never_end_are_cut_off(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that takes longer than a request may is not."""
    monkeypatch.setattr(guard, "REQUEST_SECONDS", 0.2)
    client, address = server
    half = b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    with (
        opened(address, "GET /health HTTP/1.1") as headers,
        opened(address, "POST /v1/completions HTTP/1.1", half) as body,
        httpx.Client(base_url=client.base_url) as other,
    ):
        answer = other.post("/v1/completions", json=LONG | {"stream": False})
        assert answer.elapsed.total_seconds() > 0.5
        assert answer.json()["usage"]["completion_tokens"] == 50
        assert headers.recv(1) == body.recv(1) == b""


def test_a_connection_too_many_is_told_so(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = server
    assert client.get("/health").status_code == 200  # its connection stays open
    monkeypatch.setattr(guard, "MAX_CONNECTIONS", 1)
    with httpx.Client(base_url=client.base_url) as other:
        refused = other.get("/health")
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
        assert refused.headers["connection"] == "close"
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("line", "length", "status"),
    [
        ("POST /v1/completions HTTP/1.1", "Content-Length: 104857600", 413),
        ("POST /v1/completions HTTP/1.1\r\nHost: evil.example", "Content-Length: 9", 403),
        ("POST /nowhere HTTP/1.1", "Transfer-Encoding: chunked", 404),
        ("POST /health HTTP/1.1", "Content-Length: 9", 405),
    ],
)
def test_a_body_that_nobody_reads_is_not_waited_for(
    server: Any, line: str, length: str, status: int
) -> None:
    """The answer is an error in OpenAI's form, and the connection ends with it."""
    _, address = server
    with opened(address, line, f"Content-Type: application/json\r\n{length}\r\n\r\n".encode()) as c:
        head, _, body = b"".join(iter(lambda: c.recv(2**16), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status)
    assert b"connection: close" in head
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_a_request_that_was_read_keeps_its_connection(server: Any) -> None:
    client, _ = server
    for path, body in (("/tokenize", {"content": "a"}), ("/tokenize", {"content": 1})):
        assert "connection" not in client.post(path, json=body).headers
    assert "connection" not in client.get("/nowhere").headers


def test_characters_are_not_split(server: Any) -> None:
    """Whatever bytes the model says, the text of the stream is that of the whole answer."""
    client, _ = server
    body = {"prompt": "é", "max_tokens": 40, "seed": 3, "temperature": 2}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines) == whole


def test_the_openai_client(server: Any) -> None:
    openai = pytest.importorskip("openai")
    url = f"{server[0].base_url}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny:sft", "tiny:base"]
    messages = [{"role": "user", "content": "ab"}]
    body = {"model": "tiny:sft", "messages": messages, "max_tokens": 5, "temperature": 0}
    whole = client.chat.completions.create(**body, logprobs=True, top_logprobs=2)
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options=options))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 5
    answer = client.responses.create(
        model="tiny:sft", input="ab", temperature=0, max_output_tokens=5
    )
    assert answer.output_text == text
    with client.responses.stream(
        model="tiny:sft", input="ab", temperature=0, max_output_tokens=5
    ) as events:
        deltas = [each.delta for each in events if each.type == "response.output_text.delta"]
    assert "".join(deltas) == text
    with pytest.raises(openai.NotFoundError, match="there is no model 'x'"):
        client.chat.completions.create(model="x", messages=messages)


def test_what_open_webui_sends(server: Any) -> None:
    """Recorded of 0.12: it offers tools with each message, and asks for a title in one piece."""
    client, _ = server
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    body = {
        "model": names[0],
        "messages": [{"role": "user", "content": "ab"}],
        "stream": True,
        "tools": [tool],
        "max_tokens": 5,
    }
    assert client.post("/v1/chat/completions", json=body).text.rstrip().endswith("[DONE]")
    title = body | {"stream": False, "max_completion_tokens": 1000}
    del title["tools"], title["max_tokens"]
    answer = client.post("/v1/chat/completions", json=title).json()
    assert answer["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.slow
def test_the_harness_scores_what_our_evaluation_scores(
    server: Any, served_home: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EleutherAI's `local-completions` over HTTP, on a task of the offline bundle."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("aiohttp")
    harness = pytest.importorskip("lm_eval")
    manager = pytest.importorskip("lm_eval.tasks").TaskManager
    tasks = load_bundle(OFFLINE_BUNDLE).tasks
    task = next(each for each in tasks if each.label == "offline_closing_bracket")
    configuration = {
        "task": "closing",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(task.path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "target_delimiter": task.delimiter,
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    }
    (tmp_path / "closing.yaml").write_text(json.dumps(configuration))
    found = harness.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "tiny:base",
            "base_url": f"{server[0].base_url}/v1/completions",
            "tokenizer_backend": "remote",
            "tokenized_requests": False,
        },
        tasks=["closing"],
        task_manager=manager(include_path=str(tmp_path), include_defaults=False),
        limit=12,
        bootstrap_iters=0,
    )
    model = load("tiny", device="cpu", dtype="float32", home=served_home.root)
    for sample in found["samples"]["closing"]:
        query, choices = sample["doc"]["query"], sample["doc"]["choices"]
        scores = model.score(query, *(task.delimiter + choice for choice in choices))
        theirs = [result[0] for result in sample["filtered_resps"]]
        assert theirs == pytest.approx(scores, abs=1e-3)
