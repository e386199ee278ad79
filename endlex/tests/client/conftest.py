"""Shared by the client's tests: an environment without a server, and a small server with faults."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from endlex.client.journal import Journal
from endlex.client.transport import Transport
from endlex.protocol import METRICS, check_manifest


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever the developer's shell says, tests reach only the servers that they start."""
    for name in [*os.environ]:
        if name.startswith("ENDLEX_") or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ENDLEX_ENVIRONMENT", "0")
    monkeypatch.setenv("ENDLEX_CONSOLE", "0")


@pytest.fixture(autouse=True)
def _no_shipper_left(tmp_path: Path) -> Iterator[None]:
    """A shipper goes on for as long as its server cannot be reached: end those of this test."""
    yield
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.fsencode(f"{tmp_path}{os.sep}") in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture
def write_steps() -> Callable[[Path, range], Path]:
    """Write a session of these steps to a run's directory; return its journal."""

    def write(directory: Path, steps: range) -> Path:
        opened = Journal(directory, {"name": "run"})
        for step in steps:
            opened.append(METRICS, {"step": step})
        opened.close()
        return opened.path

    return write


class StubServer:
    """The server's side of the contract, in memory, with faults that tests switch on.

    A fault is a function of method and path, called before (`before`) or after (`after`) the
    request has had its effect. It returns what to do to the client: None for nothing, a status, or
    "cut" to close the connection without an answer.
    """

    def __init__(self) -> None:
        self.journals: dict[tuple[str, str], bytearray] = {}
        self.states: list[tuple[str, str]] = []
        self.parts: dict[str, bytes] = {}
        self.partial: dict[str, bytearray] = {}
        self.manifests: dict[tuple[str, str], dict[str, Any]] = {}
        self.requests: list[tuple[str, str]] = []
        self.part_bytes_received = 0
        self.encodings: set[str] = set()
        self.token: str | None = None
        self.before: Callable[[str, str], int | str | None] = lambda method, path: None
        self.after: Callable[[str, str], int | str | None] = lambda method, path: None
        self.cut_part_after: list[int] = []
        """For each PUT of a part in turn, bytes of it after which the connection is cut."""
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._http = _start(self)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def stop(self) -> None:
        """Close it; the port stays known, for `restart`."""
        self._http.shutdown()
        self._http.server_close()

    def restart(self) -> None:
        """Serve again on the same port, with what it had."""
        self._http = _start(self, int(self._http.server_address[1]))

    def wait_for(self, happened: Callable[[], Any], seconds: float = 20.0) -> None:
        """Wait until a request made it true."""
        with self.changed:
            assert self.changed.wait_for(happened, seconds), self.requests[-20:]

    def content(self, session: str) -> bytes:
        """What it has of a session."""
        with self.lock:
            return bytes(next((v for (_, s), v in self.journals.items() if s == session), b""))


def _start(stub: StubServer, port: int = 0) -> ThreadingHTTPServer:
    handler = type("Handler", (_Handler,), {"stub": stub})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    stub: StubServer

    def log_message(self, *arguments: Any) -> None:
        """Stay silent."""

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        stub, path = self.stub, urlsplit(self.path).path.removeprefix("/api/v1")
        with stub.changed:
            stub.requests.append((self.command, path))
            fault = stub.before(self.command, path)
            if stub.token and self.headers.get("Authorization") != f"Bearer {stub.token}":
                fault = fault or 401
        body = self._body(path)
        if body is None or fault == "cut":
            return self._cut()
        if isinstance(fault, int):
            return self._answer(fault, {"error": f"fault {fault}"})
        query = {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
        with stub.changed:
            status, content = self._route(path, query, body)
            fault = stub.after(self.command, path)
            stub.changed.notify_all()
        if fault == "cut":
            return self._cut()
        if isinstance(fault, int):
            return self._answer(fault, {"error": f"fault {fault}"})
        return self._answer(status, content)

    def _body(self, path: str) -> bytes | None:
        length = int(self.headers.get("Content-Length", 0))
        if path.startswith("/parts/") and self.command == "PUT" and self.stub.cut_part_after:
            kept = self.rfile.read(min(length, self.stub.cut_part_after.pop(0)))
            with self.stub.lock:
                self.stub.part_bytes_received += len(kept)
                self.stub.partial.setdefault(path.split("/")[2], bytearray()).extend(kept)
            return None
        body = self.rfile.read(length)
        if self.headers.get("Content-Encoding") == "deflate":
            self.stub.encodings.add("deflate")
            body = zlib.decompress(body)
        return body

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, content: Any) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _route(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        names = [unquote(name) for name in path.split("/")[1:]]
        if re.fullmatch(r"/runs/[^/]+/sessions/[^/]+/journal", path):
            return self._journal((names[1], names[3]), query, body)
        if re.fullmatch(r"/runs/[^/]+/sessions/[^/]+/state", path):
            self.stub.states.append((names[3], json.loads(body)["status"]))
            return 200, {}
        if path == "/parts/missing":
            asked = json.loads(body)["parts"]
            missing = [part for part in asked if part not in self.stub.parts]
            partial = {p: len(self.stub.partial[p]) for p in missing if p in self.stub.partial}
            return 200, {"missing": missing, "partial": partial}
        if names[0] == "parts":
            return self._part(names[1], int(query["offset"]), body)
        if "files" in names:
            return self._file(names)
        if names[2:] == ["checkpoints"]:
            known = {"state": "published", "created": 0.0, "metadata": None}
            return 200, [known | m for key, m in self.stub.manifests.items() if key[0] == names[1]]
        return self._manifest((names[1], names[3]), body)

    def _journal(self, key: tuple[str, str], query: dict[str, str], body: bytes) -> tuple[int, Any]:
        held = self.stub.journals.get(key, bytearray())
        if self.command == "GET":
            if key not in self.stub.journals:
                return 404, {"error": "unknown"}
            upto = int(query["upto"])
            return 200, {"offset": len(held), "sha256": hashlib.sha256(held[:upto]).hexdigest()}
        offset = int(query["offset"])
        if query["crc"] != f"{zlib.crc32(body):08x}" or not body.endswith(b"\n"):
            return 400, {"error": "damaged"}
        if offset > len(held):
            return 409, {"error": "gap", "offset": len(held)}
        assert held[offset : offset + len(body)] == body[: len(held) - offset]
        held += body[len(held) - offset :]
        self.stub.journals[key] = held
        return 200, {"offset": len(held)}

    def _part(self, sha256: str, offset: int, body: bytes) -> tuple[int, Any]:
        self.stub.part_bytes_received += len(body)
        held = self.stub.partial.get(sha256, bytearray())
        if sha256 in self.stub.parts:
            return 200, {"stored": True}
        if offset != len(held):
            return 409, {"error": "gap", "offset": len(held)}
        content = bytes(held + body)
        self.stub.partial.pop(sha256, None)
        if hashlib.sha256(content).hexdigest() != sha256:
            return 400, {"error": "wrong hash"}
        self.stub.parts[sha256] = content
        return 201, {"stored": True}

    def _manifest(self, key: tuple[str, str], body: bytes) -> tuple[int, Any]:
        known = self.stub.manifests.get(key)
        if self.command == "GET":
            return (200, {**known, "state": "published"}) if known else (404, {"error": "unknown"})
        manifest: Any = check_manifest(json.loads(body))
        if known is not None and known != manifest:
            return 409, {"error": "another checkpoint has this name"}
        parts = [part["sha256"] for file in manifest["files"] for part in file["parts"]]
        missing = [part for part in parts if part not in self.stub.parts]
        if missing:
            return 409, {"state": "incomplete", "missing": missing}
        for file in manifest["files"]:
            if hashlib.sha256(self._join(file)).hexdigest() != file["sha256"]:
                return 422, {"state": "failed", "error": "wrong hash"}
        if key not in self.stub.manifests:
            self.stub.manifests[key] = manifest
            return 202, {"state": "verifying", "done_bytes": 0, "total_bytes": 1}
        return 200, {"state": "published"}

    def _join(self, file: dict[str, Any]) -> bytes:
        return b"".join(self.stub.parts[part["sha256"]] for part in file["parts"])

    def _file(self, names: list[str]) -> tuple[int, Any]:
        manifest = self.stub.manifests[names[1], names[3]]
        (file,) = [f for f in manifest["files"] if f["path"] == "/".join(names[5:])]
        start, end = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()  # type: ignore[union-attr]
        return 206, self._join(file)[int(start) : int(end) + 1]


@pytest.fixture
def stub() -> Iterator[StubServer]:
    server = StubServer()
    yield server
    server.stop()


@pytest.fixture
def transport(stub: StubServer) -> Iterator[Transport]:
    made = Transport(stub.url)
    yield made
    made.close()


@pytest.fixture
def black_hole() -> Iterator[str]:
    """URL of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def until() -> Callable[..., None]:
    """Wait until a condition holds that no event announces, such as a file's."""

    def wait(holds: Callable[[], Any], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.01)

    return wait
