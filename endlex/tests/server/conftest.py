"""A server in this process, on a data directory of its own, and a journal to send it."""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from endlex.protocol import PROTOCOL
from endlex.server.app import build_app
from endlex.server.settings import Settings

RUN = "testrun001"
SESSION = "000001-abcdef012345"
PART = 1000
"""Bytes of a checkpoint's part here: small, so that small files have several."""


class Box:
    """The training side, as far as these tests need it: sends whole lines, keeps its offset."""

    def __init__(self, client: TestClient, run: str = RUN, session: str = SESSION) -> None:
        self.client, self.run, self.session = client, run, session
        self.sent = b""

    @staticmethod
    def lines(records: list[Mapping[str, Any]]) -> bytes:
        return b"".join(json.dumps(record).encode() + b"\n" for record in records)

    def session_record(self, **changes: Any) -> dict[str, Any]:
        return {
            "type": "session",
            "session": self.session,
            "seq": 0,
            "time": 1_700_000_000.0,
            "protocol": PROTOCOL,
            "run": self.run,
            "project": "tests",
            "name": "a run",
            "config": {"lr": 0.1},
            "tags": ["fast"],
            "group": None,
            "notes": "",
            "host": "box",
            "pid": 1,
            "rank": 0,
            "kind": "trainer",
            **changes,
        }

    def metrics(self, step: int, values: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
        head = {"type": "metrics", "session": self.session, "seq": step + 1, "step": step}
        return {**head, "time": 1_700_000_000.0 + step, "values": dict(values), **changes}

    @property
    def url(self) -> str:
        return f"/api/v1/runs/{self.run}/sessions/{self.session}/journal"

    def post(self, body: bytes, offset: int, **headers: str) -> Any:
        query = {"offset": str(offset), "crc": f"{zlib.crc32(body):08x}"}
        return self.client.post(self.url, params=query, content=body, headers=headers)

    def begin(self, **changes: Any) -> None:
        self.send([self.session_record(**changes)])

    def send(self, records: list[Mapping[str, Any]]) -> None:
        body = self.lines(records)
        answer = self.post(body, len(self.sent))
        assert answer.status_code == 200, answer.text
        self.sent += body
        assert answer.json() == {"offset": len(self.sent)}

    @staticmethod
    def sha256_of(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    def put_part(self, content: bytes, offset: int = 0, sha256: str | None = None) -> Any:
        url = f"/api/v1/parts/{sha256 or self.sha256_of(content)}"
        return self.client.put(url, params={"offset": offset}, content=content[offset:])

    def send_parts(self, files: Mapping[str, bytes]) -> None:
        for content in files.values():
            for part in _parts(content):
                assert self.put_part(part).status_code in (200, 201)

    @staticmethod
    def manifest_of(
        name: str, files: Mapping[str, bytes], step: int = 10, **changes: Any
    ) -> dict[str, Any]:
        listed = [
            {"path": path, **_described(content), "parts": [*map(_described, _parts(content))]}
            for path, content in files.items()
        ]
        head = {"protocol": PROTOCOL, "name": name, "step": step, "created": 1.7e9}
        more = {"aliases": ["last"], "metadata": {"note": "x"}}
        return {**head, **more, "files": listed, **changes}

    def put_manifest(self, name: str, manifest: Mapping[str, Any]) -> Any:
        """Put it until the server has verified it."""
        url = f"/api/v1/runs/{self.run}/checkpoints/{name}"
        answer = self.client.put(url, json=manifest)
        deadline = time.monotonic() + 10
        while answer.status_code == 202 and time.monotonic() < deadline:
            answer = self.client.put(url, json=manifest)
        return answer

    def publish(
        self, name: str, files: Mapping[str, bytes], step: int = 10, **changes: Any
    ) -> None:
        self.send_parts(files)
        answer = self.put_manifest(name, self.manifest_of(name, files, step, **changes))
        assert (answer.status_code, answer.json()["state"]) == (200, "published"), answer.text


def _parts(content: bytes) -> list[bytes]:
    return [content[i : i + PART] for i in range(0, len(content), PART)]


def _described(content: bytes) -> dict[str, Any]:
    return {"sha256": Box.sha256_of(content), "bytes": len(content)}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "server"


@pytest.fixture
def start(data_dir: Path) -> Iterator[Callable[..., TestClient]]:
    """Start a server with other settings, or once more on the same data."""
    running: list[TestClient] = []

    def begin(**changes: Any) -> TestClient:
        settings = Settings(**{"min_free_bytes": 0, **changes})
        client = TestClient(build_app(data_dir, settings), base_url="http://127.0.0.1")
        running.append(client)
        return client.__enter__()

    yield begin
    for client in running:
        client.__exit__(None, None, None)


@pytest.fixture
def client(start: Callable[..., TestClient]) -> TestClient:
    return start()


@pytest.fixture
def box(client: TestClient) -> Box:
    return Box(client)


@pytest.fixture
def run(box: Box) -> Box:
    """The sender of a run whose first session has begun."""
    box.begin()
    return box


@pytest.fixture
def make_box() -> Callable[..., Box]:
    """Make the sender of a run's session to a server."""

    def make(client: TestClient, run: str = RUN, session: str = SESSION) -> Box:
        return Box(client, run, session)

    return make
