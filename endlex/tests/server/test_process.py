"""A real server process: killed at any moment, and asked what a well-behaved client never asks."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from endlex.server.api.auth import create_token

RUN = "testrun001"
SESSION = "000001-abcdef012345"
JOURNAL = f"/api/v1/runs/{RUN}/sessions/{SESSION}/journal"
SERVE = (
    "import sys; from pathlib import Path; from endlex.server.app import serve; "
    "from endlex.server.settings import Settings; "
    "serve(Path(sys.argv[1]), Settings(port=0, min_free_bytes=0, public=sys.argv[2] == 'public'))"
)
RECORDS = 3000


class Process:
    """A server on a free port, started again on the same data after each end."""

    def __init__(self, data: Path, log: Path, mode: str = "private") -> None:
        self.data, self.log, self.mode = data, log, mode

    def start(self) -> None:
        command = [sys.executable, "-c", SERVE, str(self.data), self.mode]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        lines: queue.Queue[str] = queue.Queue()
        assert self.process.stdout is not None
        threading.Thread(
            target=lambda: lines.put(self.process.stdout.readline()), daemon=True
        ).start()
        line = lines.get(timeout=30)
        self.port = int(line.strip().rpartition(":")[2])

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        status, content = self.ask("GET", path)
        assert status == 200, content
        return json.loads(content)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    running = Process(tmp_path / "data", tmp_path / "log")
    running.start()
    yield running
    running.end()


def journal() -> bytes:
    head = {"type": "session", "session": SESSION, "seq": 0, "time": 1.0, "protocol": 2}
    about = {"run": RUN, "project": "p", "name": "n", "config": {}, "kind": "trainer"}
    lines = [json.dumps(head | about)]
    for step in range(RECORDS):
        record = {"type": "metrics", "session": SESSION, "seq": step + 1, "time": 1.0 + step}
        lines.append(json.dumps(record | {"step": step, "values": {"loss": step / 7, "lr": step}}))
    return b"".join(line.encode() + b"\n" for line in lines)


def send_until_killed(process: Process, content: bytes, cuts: list[int], offset: int) -> None:
    """Send batches until the connection breaks, or all is there."""
    try:
        for start, end in pairwise(cuts):
            if start < offset:
                continue
            body = content[start:end]
            query = f"offset={start}&crc={zlib.crc32(body):08x}"
            if process.ask("POST", f"{JOURNAL}?{query}", body)[0] != 200:
                return
    except (OSError, http.client.HTTPException):
        return


@pytest.mark.slow
def test_a_killed_server_holds_a_prefix_of_the_journal_and_its_points(process: Process) -> None:
    rng = random.Random(7)
    content = journal()
    ends = [0] + [i + 1 for i, byte in enumerate(content) if byte == 10]
    cuts = sorted({0, len(content), *rng.sample(ends, 200)})
    offset = 0
    for _ in range(3):
        sender = threading.Thread(target=send_until_killed, args=(process, content, cuts, offset))
        sender.start()
        time.sleep(rng.uniform(0.02, 0.25))
        process.kill()
        sender.join(30)
        process.start()
        status, answer = process.ask("GET", JOURNAL)
        if status == 404:
            continue
        known = json.loads(answer)
        offset = known["offset"]
        assert offset in cuts
        assert known["sha256"] == hashlib.sha256(content[:offset]).hexdigest()
        points = content[:offset].count(b'"metrics"')
        series = process.get(f"/api/v1/runs/{RUN}/series?metric=loss&points=100000")["series"]
        assert series["loss"]["x"] == list(range(points))
    send_until_killed(process, content, cuts, offset)
    status, raw = process.ask("GET", f"{JOURNAL}/raw")
    assert (status, raw) == (200, content)
    series = process.get(f"/api/v1/runs/{RUN}/series?metric=lr&points=100000")["series"]["lr"]
    assert series["x"] == series["y"] == list(range(RECORDS))


def test_a_part_cut_by_a_kill_or_the_network_goes_on(process: Process) -> None:
    content = os.urandom(6 * 2**20)
    sha256 = hashlib.sha256(content).hexdigest()
    path = f"/api/v1/parts/{sha256}"

    def held() -> int:
        asked = json.dumps({"parts": [sha256]}).encode()
        found = json.loads(process.ask("POST", "/api/v1/parts/missing", asked)[1])
        return int(found["partial"].get(sha256, 0)) if found["missing"] else len(content)

    def send_some(offset: int, end: int) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=30)
        connection.putrequest("PUT", f"{path}?offset={offset}")
        connection.putheader("Content-Length", str(len(content) - offset))
        connection.endheaders()
        connection.send(content[offset:end])
        return connection

    def wait_for(size: int) -> None:
        deadline = time.monotonic() + 20
        while held() < size and time.monotonic() < deadline:
            time.sleep(0.02)
        assert held() >= size

    first = send_some(0, 3 * 2**20)
    wait_for(2 * 2**20)
    process.kill()
    first.close()
    process.start()
    kept = held()
    assert kept >= 2 * 2**20
    second = send_some(kept, kept + 2**20 + 17)
    wait_for(kept + 2**20)
    second.close()  # a cut: what came stays
    wait_for(kept + 2**20 + 17)
    kept = held()
    deadline = time.monotonic() + 20
    status = 429
    while status == 429 and time.monotonic() < deadline:  # until the cut was noticed
        status, _ = process.ask("PUT", f"{path}?offset={kept}", content[kept:])
    assert status == 201
    stored = process.data / "parts" / sha256[:2] / sha256
    assert stored.read_bytes() == content


def test_raw_paths_lead_nowhere(process: Process) -> None:
    for target in (
        "/../../etc/passwd",
        "/static/../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/api/v1/parts/../../endlex.sqlite3",
        f"/api/v1/runs/../{RUN}",
        f"/api/v1/runs/{RUN}/checkpoints/../../../endlex.sqlite3",
        f"/api/v1/runs/{RUN}/checkpoints/c/files/../../../../../etc/passwd",
        f"/api/v1/runs/{RUN}/checkpoints/c/files//etc/passwd",
        f"/api/v1/runs/{RUN}/sessions/..%2f..%2fx/journal/raw",
    ):
        status, content = process.ask("GET", target)
        assert status in (400, 404, 405, 422), (target, status)
        assert b"root:" not in content
        assert b"SQLite" not in content


def test_a_public_server_streams_events_ends_at_once_and_logs_no_token(tmp_path: Path) -> None:
    token = create_token(tmp_path / "data", "box", ["read", "write"])
    process = Process(tmp_path / "data", tmp_path / "log", "public")
    process.start()
    try:
        headers = {"Authorization": f"Bearer {token}"}
        assert process.ask("GET", "/api/v1/events")[0] == 401
        connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=20)
        connection.request("GET", "/api/v1/events", headers=headers)
        stream = connection.getresponse()
        assert stream.getheader("Content-Type", "").startswith("text/event-stream")
        content = journal()
        query = f"offset=0&crc={zlib.crc32(content):08x}"
        assert process.ask("POST", f"{JOURNAL}?{query}", content, headers)[0] == 200
        kinds = set()
        while kinds < {"run", "metrics"}:
            line = stream.readline().decode().strip()
            if line.startswith("event: "):
                kinds.add(line.removeprefix("event: "))
            if line.startswith("data: ") and "metrics" in line:
                assert json.loads(line.removeprefix("data: "))["last_step"] == RECORDS - 1
        began = time.monotonic()
        process.end()
        assert time.monotonic() - began < 9, "a reader of events kept the server from ending"
        assert process.process.returncode in (0, -signal.SIGTERM)
    finally:
        process.end()
    log = process.log.read_text()
    assert token not in log
    assert "Traceback" not in log
