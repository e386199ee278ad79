"""What an attacker or a broken client sends: refused in words, in bounded memory, without trace."""

from __future__ import annotations

import asyncio
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi import Request

from endlex.protocol import MAX_BATCH_BYTES
from endlex.server.api import bodies
from endlex.server.errors import ApiError

RUN = "testrun001"
SESSION = "000001-abcdef012345"
OUTSIDE = [
    "../../../etc/passwd",
    "/etc/passwd",
    "a/../../b",
    "..\\x",
    "x\x00y",
    "%2e%2e",
]


def variants(name: str) -> list[str]:
    return [quote(name, safe=""), quote(name), quote(quote(name, safe=""), safe="")]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_out_of_the_data(client: Any, box: Any, data_dir: Path, name: str) -> None:
    box.begin()
    before = sorted(path.name for path in data_dir.parent.rglob("*"))
    for part in variants(name):
        for method, path in (
            ("GET", f"/api/v1/runs/{part}"),
            ("GET", f"/api/v1/runs/{part}/sessions/{SESSION}/journal"),
            ("GET", f"/api/v1/runs/{RUN}/sessions/{part}/journal/raw"),
            ("POST", f"/api/v1/runs/{part}/sessions/{SESSION}/journal?offset=0&crc=00000000"),
            ("POST", f"/api/v1/runs/{RUN}/sessions/{part}/journal?offset=0&crc=00000000"),
            ("PUT", f"/api/v1/parts/{part}"),
            ("PUT", f"/api/v1/runs/{RUN}/checkpoints/{part}"),
            ("GET", f"/api/v1/runs/{RUN}/checkpoints/{part}"),
            ("GET", f"/api/v1/runs/{RUN}/checkpoints/c/files/{part}"),
            ("GET", f"/api/v1/runs/{RUN}/export?format={part}"),
        ):
            answer = client.request(method, path, content=b"{}" if method == "PUT" else None)
            assert answer.status_code in (400, 404, 405, 422), (method, path, answer.status_code)
            assert b"root:" not in answer.content
    unchanged = {"endlex.sqlite3-wal", "endlex.sqlite3-shm"}
    after = sorted(path.name for path in data_dir.parent.rglob("*"))
    assert set(after) - set(before) <= unchanged


def test_a_body_beyond_the_limit_is_refused_in_bounded_memory(client: Any, box: Any) -> None:
    box.begin()
    query = {"offset": str(len(box.sent)), "crc": "00000000"}

    def endless() -> Iterator[bytes]:  # no length is told
        for _ in range(48):
            yield b"x" * 2**20

    tracemalloc.start()
    try:
        answer = client.post(box.url, params=query, content=bytes(MAX_BATCH_BYTES + 1))
        assert answer.status_code == 413
        bomb = zlib.compress(bytes(128 * 2**20), 9)
        tracemalloc.reset_peak()
        headers = {"Content-Encoding": "deflate"}
        answer = client.post(box.url, params=query, content=bomb, headers=headers)
        assert answer.status_code == 413
        assert tracemalloc.get_traced_memory()[1] < 6 * MAX_BATCH_BYTES
    finally:
        tracemalloc.stop()
    assert client.post(box.url, params=query, content=endless()).status_code == 413
    assert client.post("/api/v1/prune", content=bytes(2 * 2**20)).status_code == 413
    assert client.post("/api/v1/login", content=b"token=" + bytes(9000)).status_code == 413


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"parts": "abc"}']
)
def test_json_that_is_not_what_was_asked_for_is_refused(client: Any, box: Any, body: bytes) -> None:
    box.begin()
    for method, path in (
        ("POST", "/api/v1/parts/missing"),
        ("POST", "/api/v1/prune"),
        ("PATCH", f"/api/v1/runs/{RUN}"),
        ("POST", f"/api/v1/runs/{RUN}/sessions/{SESSION}/state"),
        ("PUT", f"/api/v1/runs/{RUN}/checkpoints/c"),
    ):
        answer = client.request(method, path, content=body)
        assert answer.status_code in (400, 422), (method, path, answer.text)
        assert answer.json()["error"]


def test_a_body_that_stands_still_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "SILENCE_SECONDS", 0.02)
    sent = [{"type": "http.request", "body": b"some", "more_body": True}]

    async def receive() -> Any:
        return sent.pop() if sent else await asyncio.Event().wait()

    request = Request({"type": "http", "headers": [], "method": "POST"}, receive)
    with pytest.raises(ApiError) as given_up:
        asyncio.run(asyncio.wait_for(bodies.read_body(request, 100), 10))
    assert given_up.value.status == 408


def test_asking_for_too_many_parts_or_wrong_ones_is_refused(client: Any) -> None:
    for parts in (["0" * 64] * 4097, ["xyz"], [7], [None], ["../" * 21 + "0"]):
        answer = client.post("/api/v1/parts/missing", json={"parts": parts})
        assert answer.status_code == 422


def test_wrong_queries_are_refused_in_words(client: Any, box: Any) -> None:
    box.begin()
    for path in (
        "/api/v1/runs?limit=0",
        "/api/v1/runs?limit=ten",
        "/api/v1/runs?offset=-1",
        "/api/v1/runs?q=val/bpb<low",
        f"/api/v1/runs/{RUN}/texts?before_step=99999999999999999999",
        f"/api/v1/runs/{RUN}/series?metric=a&from=x",
        f"/api/v1/runs/{RUN}/export?format=exe",
        f"{box.url}?upto=-1",
    ):
        answer = client.get(path)
        assert answer.status_code == 422, path
        assert answer.json()["error"]
    said = client.get("/api/v1/runs?limit=ten").json()["error"]
    assert said.startswith("limit 'ten': ")
    said = client.post("/api/v1/prune", json={"keep_last": 0}).json()["error"]
    assert said.startswith("keep_last '0': ")
    for query in ("crc=00000000", "offset=0", "offset=-1&crc=00000000", "offset=0&crc=12"):
        assert client.post(f"{box.url}?{query}", content=b"").status_code == 422


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "'; DROP TABLE run; --", '"><img>'])
def test_markup_and_sql_in_names_are_text(client: Any, make_box: Any, name: str) -> None:
    box = make_box(client)
    box.begin(name=name, project=name, notes=name, group=name, tags=[name])
    text = {"type": "text", "time": 1.0, "step": 1, "name": name, "text": name}
    box.send([text, box.metrics(1, {name: 1.0})])
    answer = client.get(
        "/api/v1/runs", params={"q": '"{}"'.format(name.replace('"', "")), "sort": name}
    )
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()["runs"][0]
    assert (found["name"], found["tags"], found["summary"]) == (name, [name], {name: 1.0})
    assert client.get(f"/api/v1/runs/{RUN}/texts").json()["texts"][0]["text"] == name
    exported = client.get(f"/api/v1/runs/{RUN}/export?format=json")
    assert exported.headers["content-disposition"].startswith("attachment; filename=")
    assert "<" not in exported.headers["content-disposition"]
