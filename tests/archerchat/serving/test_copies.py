"""Copies of the server in processes of their own answer as one."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from archerchat.serving.config import ServeConfig
from archerchat.serving.copies import Copy, build_front

pytestmark = pytest.mark.slow  # three processes that import torch
TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def client(served_home: Any, listen: Any) -> Iterator[httpx.Client]:
    config = ServeConfig(device="cpu", dtype="float32", api_key="secret", max_batch=1)
    with (
        listen(build_front(served_home, config, 2)) as address,
        httpx.Client(base_url="http://{}:{}".format(*address), timeout=60) as found,
    ):
        found.headers["authorization"] = "Bearer secret"
        for prompt in "abcdefgh":  # so that both copies have loaded the model
            found.post(TEXT, json={"prompt": prompt, "max_tokens": 1})
        yield found


def copy_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.headers["archerchat-copy"]


def test_requests_at_once_are_shared_and_a_prompt_finds_its_copy(client: httpx.Client) -> None:
    body = {"prompt": "abcdefgh ijklmnop qrstuvwx", "max_tokens": 20, "n": 8, "seed": 1}
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.post(TEXT, json=body)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {copy_of(answer) for answer in answers} == {"0", "1"}
    assert len({str(answer.json()["choices"]) for answer in answers}) == 1
    before = client.get("/stats").json()
    again = client.post(TEXT, json=body | {"max_tokens": 2})
    assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    stats = client.get("/stats").json()
    assert (stats["copies"], stats["rows"], stats["samples_in_work"]) == (2, 0, 0)
    assert stats["requests_total"] == before["requests_total"] + 1 == 13
    assert "archerchat_requests_total 13\n" in client.get("/metrics").text
    lines = client.post(TEXT, json=body | {"stream": True, "n": 1}).text.split("\n\n")
    assert lines[0].startswith("data: {")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert client.post(TEXT, json={"prompt": 3}).json()["error"]["param"] == "prompt"
    assert "ArcherChat" in client.get("/").text
    assert client.get("/v1/models", headers={"authorization": "Bearer x"}).status_code == 401


def test_headers_and_paths_arrive_as_they_were_sent(client: httpx.Client) -> None:
    """Bytes beyond ASCII, and names with a quoted colon, question mark and percent sign."""
    headers = [(b"x-name", "Zoë".encode()), (b"x-name", b"\xff")]
    assert client.get("/v1/models", headers=headers).status_code == 200
    assert client.get("/v1/models/tiny%3Abase").json()["id"] == "tiny:base"
    answer = client.get("/v1/models/a%3Fb%25")
    assert "'a?b%'" in answer.json()["error"]["message"]
    assert len(answer.headers.get_list("server")) == 1


def test_a_client_that_leaves_frees_its_row_in_the_copy(client: httpx.Client) -> None:
    body = {"prompt": "ab", "max_tokens": 50, "n": 128, "stream": True}
    body |= {"logit_bias": {"351": -100}}  # no BOS, which would end it
    before = client.get("/stats").json()["generated_tokens_total"]
    with client.stream("POST", TEXT, json=body) as response:
        assert next(response.iter_lines()).startswith("data: {")
    while (stats := client.get("/stats").json())["samples_in_work"]:
        time.sleep(0.01)
    assert stats["generated_tokens_total"] - before < 0.9 * 128 * 50


def test_a_client_that_leaves_while_it_sends_is_no_error(served_home: Any) -> None:
    app, sent = build_front(served_home, ServeConfig(), 1), []
    messages = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": b'{"prompt', "more_body": True},
    ]

    async def receive() -> Any:
        return messages.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": TEXT, "headers": headers}
    asyncio.run(app({**scope, "query_string": b"", "asgi": {"version": "3.0"}}, receive, send))
    assert not sent


def test_a_copy_that_ends_is_started_again(client: httpx.Client) -> None:
    mine = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
    assert len(mine) == 2
    os.kill(mine[0].pid, signal.SIGKILL)
    body = {"prompt": "ab", "max_tokens": 1}
    codes, copies = set(), set()
    until = time.monotonic() + 60
    while len(copies) < 2 and time.monotonic() < until:
        answer = client.post(TEXT, json=body | {"prompt": f"a{len(codes)}{time.monotonic()}"})
        codes.add(answer.status_code)
        copies |= {answer.headers.get("archerchat-copy")} - {None}
    assert copies == {"0", "1"}
    assert codes <= {200, 503}


def test_the_end_of_the_copies_reports_no_error(
    served_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C printed a traceback of the tasks that start copies again."""
    problems: list[Any] = []

    async def start(copy: Any) -> None:
        copy.process = SimpleNamespace(
            is_alive=lambda: True, terminate=lambda: None, join=lambda: None
        )

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, told: problems.append(told))
        app = build_front(served_home, ServeConfig(), 2)
        async with app.router.lifespan_context(app):
            await asyncio.sleep(0)
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0)
        gc.collect()

    monkeypatch.setattr(Copy, "start", start)
    asyncio.run(run())
    assert not problems
