"""Downloads from a hub on 127.0.0.1 that misbehaves: resumed, retried, checked, whole or absent."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from archerchat import downloads
from archerchat.data.hub import SOURCES, HubSource, download_shards
from archerchat.data.shards import iter_documents, list_shards, split_shards, write_shards
from archerchat.errors import DataError, UsageError
from archerchat.tasks.hub import TaskFiles, load_tables
from archerchat.tasks.registry import build_task

SOURCE = HubSource("someone/texts", 6)
RESOLVE = f"/datasets/{SOURCE.repository}/resolve/main"
VALIDATION = "shard_00005.parquet"
FIRST = "shard_00000.parquet"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up after three attempts, without waiting."""
    monkeypatch.setattr(downloads, "ATTEMPTS", 3)
    monkeypatch.setattr(downloads, "FIRST_DELAY_SECONDS", 0.001)


class Hub:
    """Serve `files` as the hub does: an address that redirects to storage on another host.

    Attributes:
        faults: by file name, what to do with its next GETs, in turn: `drop` (close after half),
            a status such as `500`, `garbage` (as many bytes, but wrong), `whole` (ignore Range),
            `stall` (send half, then nothing). After these it behaves.
        gets: by file name, the Range headers of its GETs.
        requests: how many requests came, of any kind.
        authorizations: what the requests at its own address say of their user.
        resolve: where its files' addresses begin.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.faults: dict[str, list[str]] = {}
        self.gets: dict[str, list[str | None]] = {}
        self.requests = 0
        self.authorizations: set[str | None] = set()
        self.resolve = RESOLVE
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}/storage"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def answer(self, status: int, length: int, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(length), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()

        def look_up(self) -> tuple[str, bytes | None]:
            hub.requests += 1
            if self.path.startswith(hub.resolve):
                hub.authorizations.add(self.headers.get("Authorization"))
            name = self.path.rpartition("/")[2]
            known = self.path in (f"{hub.resolve}/{name}", f"/storage/{name}")
            return name, hub.files.get(name) if known else None

        def redirect(self, name: str, content: bytes) -> None:
            self.answer(
                302,
                0,
                Location=f"{hub.storage}/{name}",
                X_Linked_ETag=f'"{hashlib.sha256(content).hexdigest()}"',
                X_Linked_Size=str(len(content)),
                X_Repo_Commit="0" * 40,
            )

        def do_HEAD(self) -> None:
            name, content = self.look_up()
            if content is None:
                self.answer(404, 0)
            else:
                self.redirect(name, content)

        def do_GET(self) -> None:
            name, content = self.look_up()
            if content is not None and self.path.startswith(hub.resolve):
                self.redirect(name, content)
                return
            asked = self.headers.get("Range")
            hub.gets.setdefault(name, []).append(asked)
            fault = hub.faults[name].pop(0) if hub.faults.get(name) else ""
            if content is None or fault.isdigit():
                self.answer(int(fault or 404), 0)
                return
            start = int(re.sub(r"\D", "", asked)) if asked and fault != "whole" else 0
            body = content[start:]
            if start:
                span = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.answer(206, len(body), Content_Range=span)
            else:
                self.answer(200, len(body))
            if fault == "garbage":
                body = bytes(len(body))
            elif fault in ("drop", "stall"):
                body = body[: len(body) // 2]
            self.wfile.write(body)
            if fault == "stall":
                self.wfile.flush()
                hub.closing.wait(20)

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    huggingface_hub.close_session()
    noise = random.Random(0)
    documents = [f"document {i}: {noise.randbytes(1000).hex()}" for i in range(300)]
    shards = write_shards(documents, tmp_path / "remote", documents_per_shard=50)
    serving = Hub({path.name: path.read_bytes() for path in shards})
    yield serving
    serving.close()
    huggingface_hub.close_session()


def fetch(hub: Hub, directory: Path, num_train: int = 1, **options: Any) -> list[str]:
    settings: dict[str, Any] = {"endpoint": hub.endpoint} | options
    return [path.name for path in download_shards(SOURCE, num_train, directory, **settings)]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_validation_shard_comes_whatever_number_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    assert fetch(hub, directory, num_train=2) == [VALIDATION, FIRST, "shard_00001.parquet"]
    train, validation = split_shards(list_shards(directory))
    assert [path.name for path in train] == [FIRST, "shard_00001.parquet"]
    assert [path.name for path in validation] == [VALIDATION]
    assert {path.name: path.read_bytes() for path in directory.iterdir()}.items() <= (
        hub.files.items()
    )
    assert fetch(hub, directory, num_train=3) == ["shard_00002.parquet"]
    assert [path.name for path in split_shards(list_shards(directory))[1]] == [VALIDATION]


def test_the_validation_shard_comes_first(hub: Hub, tmp_path: Path) -> None:
    hub.files.pop(VALIDATION)
    with pytest.raises(DataError, match=rf"{VALIDATION} answered 404"):
        fetch(hub, tmp_path / "data", num_train=4)
    assert not (tmp_path / "data").exists()


def test_what_is_there_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path / "data", num_train=2)
    before = hub.requests
    assert fetch(hub, tmp_path / "data", num_train=2) == []
    assert hub.requests == before


def test_a_dropped_connection_is_resumed_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.faults[FIRST] = ["drop"] * 5  # more often than failures are allowed: each brings bytes
    fetch(hub, tmp_path / "data")
    size = len(hub.files[FIRST])
    starts = [int(asked.split("=")[1][:-1]) for asked in hub.gets[FIRST] if asked]
    assert starts[:2] == [size // 2, size // 2 + (size - size // 2) // 2]
    assert len(starts) == 5
    assert names(tmp_path / "data") == [FIRST, VALIDATION]
    assert (tmp_path / "data" / FIRST).read_bytes() == hub.files[FIRST]


def test_a_server_that_ignores_the_range_is_read_from_the_start(hub: Hub, tmp_path: Path) -> None:
    hub.faults[FIRST] = ["drop", "whole"]
    fetch(hub, tmp_path / "data")
    assert (tmp_path / "data" / FIRST).read_bytes() == hub.files[FIRST]


def test_server_errors_are_retried_then_named(hub: Hub, tmp_path: Path) -> None:
    notes: list[str] = []
    hub.faults[FIRST] = ["503", "429"]
    fetch(hub, tmp_path / "data", notify=notes.append)
    assert [note[: len(FIRST)] for note in notes] == [FIRST, FIRST]
    assert "503" in notes[0]
    assert notes[0].endswith("; trying again in 0 s")
    hub.faults["shard_00001.parquet"] = ["500"] * 3
    with pytest.raises(DataError, match=r"gave up on http.*00001.* after 3 attempts .*same comm"):
        fetch(hub, tmp_path / "data", num_train=2)


def test_wrong_content_never_gets_the_name(hub: Hub, tmp_path: Path) -> None:
    hub.faults[FIRST] = ["garbage"] * 3
    with pytest.raises(DataError, match=r"its SHA-256 is \w+, the hub says"):
        fetch(hub, tmp_path / "data")
    assert names(tmp_path / "data") == [VALIDATION]
    hub.faults[FIRST] = ["drop", "garbage"]  # the first half right, the second wrong
    fetch(hub, tmp_path / "data")
    assert (tmp_path / "data" / FIRST).read_bytes() == hub.files[FIRST]


def test_a_file_that_is_no_shard_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files[FIRST] = b"<html>not found</html>" * 100
    with pytest.raises(DataError, match=r"what arrived is unusable: cannot read \S+ as Parquet"):
        fetch(hub, tmp_path / "data")
    assert names(tmp_path / "data") == [VALIDATION]


def test_a_new_version_on_the_hub_is_not_mixed_with_the_old_part(hub: Hub, tmp_path: Path) -> None:
    hub.faults[FIRST] = ["drop", "400"]
    with pytest.raises(DataError, match="answered 400"):
        fetch(hub, tmp_path / "data")
    assert [name[:21] for name in names(tmp_path / "data")] == [f".{FIRST}.", VALIDATION]
    hub.files[FIRST] = hub.files["shard_00001.parquet"]
    fetch(hub, tmp_path / "data")
    assert (tmp_path / "data" / FIRST).read_bytes() == hub.files[FIRST]
    assert names(tmp_path / "data") == [FIRST, VALIDATION]
    assert hub.gets[FIRST][-1] is None


def test_a_full_disk_is_named_at_once(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("archerchat.files.os.fsync", full)
    with pytest.raises(DataError, match=r"cannot write .*\(No space left on device\): free some"):
        fetch(hub, tmp_path / "data")
    assert len(hub.gets[VALIDATION]) == 1


@pytest.mark.parametrize("disabled", [True, False])
def test_the_user_decides_whether_the_hub_gets_the_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disabled: bool
) -> None:
    """HF_HUB_DISABLE_IMPLICIT_TOKEN, as its library reads it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", disabled)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(hub, tmp_path / "data")
    assert hub.authorizations == {None if disabled else "Bearer hf_secret"}


def test_a_killed_download_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    hub.faults[FIRST] = ["stall"]
    program = (
        "from pathlib import Path\n"
        "from archerchat.data.hub import HubSource, download_shards\n"
        f"source = HubSource({SOURCE.repository!r}, {SOURCE.num_shards})\n"
        f"download_shards(source, 1, Path({str(directory)!r}), endpoint={hub.endpoint!r})\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"HF_TOKEN": ""})
    end = time.monotonic() + 20
    while not any(path.stat().st_size for path in directory.glob(f".{FIRST}.*.part")):
        assert child.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert [path.name for path in list_shards(directory)] == [VALIDATION]
    (part,) = directory.glob(f".{FIRST}.*.part")
    arrived = part.stat().st_size
    fetch(hub, directory)
    assert names(directory) == [FIRST, VALIDATION]
    assert hub.gets[FIRST][1] == f"bytes={arrived}-"
    assert list(iter_documents([directory / FIRST]))[1].startswith("document 1: ")


def test_progress_is_reported_up_to_the_size_of_each_file(hub: Hub, tmp_path: Path) -> None:
    reports: dict[str, list[tuple[int, int]]] = {}

    def report(name: str, arrived: int, size: int) -> None:
        reports.setdefault(name, []).append((arrived, size))

    fetch(hub, tmp_path / "data", report=report)
    for name in (VALIDATION, FIRST):
        size = len(hub.files[name])
        assert reports[name][0] == (0, size)
        assert reports[name][-1] == (size, size)


TABLE = "test-00000-of-00001.parquet"


def arc_table() -> bytes:
    """ARC's columns as the hub has them, on a few rows."""
    choices = [{"text": ["iron", "air"], "label": ["A", "B"]}] * 500
    columns = {"id": list("x" * 500), "question": [f"{i}?" for i in range(500)]}
    buffer = io.BytesIO()
    table = pa.table(columns | {"choices": choices, "answerKey": ["B"] * 500})
    pq.write_table(table, buffer, row_group_size=100)
    return buffer.getvalue()


@pytest.fixture
def as_default(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it the hub that HF_ENDPOINT would name."""
    name, constants = "HUGGINGFACE_CO_URL_TEMPLATE", huggingface_hub.constants
    url = getattr(constants, name).replace(constants.ENDPOINT, hub.endpoint)
    monkeypatch.setattr(constants, name, url)


@pytest.mark.usefixtures("as_default")
def test_a_task_s_table_comes_at_its_pinned_revision_and_once(hub: Hub, tmp_path: Path) -> None:
    table = load_tables()["ARC-Easy"]
    hub.resolve = f"/datasets/{table.repository}/resolve/{table.revision}/ARC-Easy"
    hub.files[TABLE] = arc_table()
    hub.faults[TABLE] = ["drop", "500"]
    notes: list[str] = []
    files = TaskFiles(tmp_path / "cache", notify=notes.append)
    task = build_task("arc-easy", "test", files)
    assert (len(task), task[499]["messages"][1]["content"]) == (500, "B")
    assert task[7]["messages"][0]["content"].startswith("Multiple Choice question: 7?\n- iron=A")
    assert notes[0] == f"fetching ARC-Easy/{TABLE} of allenai/ai2_arc"
    assert hub.gets[TABLE][1] == f"bytes={len(hub.files[TABLE]) // 2}-"  # it went on
    cached = tmp_path / "cache" / "allenai--ai2_arc" / table.revision[:12] / "ARC-Easy"
    assert names(cached) == [TABLE]
    before = hub.requests
    assert len(build_task("ARC-Easy", "test", files)) == 500
    assert hub.requests == before


@pytest.mark.usefixtures("as_default")
def test_a_table_that_is_no_parquet_is_refused(hub: Hub, tmp_path: Path) -> None:
    table = load_tables()["ARC-Easy"]
    hub.resolve = f"/datasets/{table.repository}/resolve/{table.revision}/ARC-Easy"
    hub.files[TABLE] = b"not found" * 1000
    files = TaskFiles(tmp_path / "cache")
    with pytest.raises(DataError, match=r"what arrived is unusable.*--data-dir names a folder"):
        files.rows(table, "test")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("num_train", [0, 6])
def test_impossible_numbers_are_refused(num_train: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"at least 1"):
        download_shards(SOURCE, num_train, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_the_sources_are_the_specifications() -> None:
    climbmix = SOURCES["climbmix"].shard_names(2)
    assert climbmix == ["shard_06542.parquet", "shard_00000.parquet", "shard_00001.parquet"]
    assert SOURCES["climbmix"].repository == "karpathy/climbmix-400b-shuffle"
    assert SOURCES["fineweb-edu"].repository == "karpathy/fineweb-edu-100b-shuffle"
    assert SOURCES["fineweb-edu"].shard_names(1)[0] == "shard_01821.parquet"
