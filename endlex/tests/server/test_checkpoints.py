"""Parts and manifests: what is published is whole, and nothing else can be seen."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from endlex.protocol import MAX_PART_BYTES
from endlex.server import blobs
from endlex.server.errors import ApiError
from endlex.server.retention import collect_parts

RUN = "testrun001"
URL = f"/api/v1/runs/{RUN}/checkpoints"
PART = 1000


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def manifest_of(
    name: str, files: dict[str, bytes], step: int = 10, **changes: Any
) -> dict[str, Any]:
    listed = []
    for path, content in files.items():
        parts = [content[i : i + PART] for i in range(0, len(content), PART)]
        named = [{"sha256": digest(part), "bytes": len(part)} for part in parts]
        entry = {"path": path, "bytes": len(content), "sha256": digest(content), "parts": named}
        listed.append(entry)
    manifest = {"protocol": 2, "name": name, "step": step, "created": 1.7e9, "aliases": ["last"]}
    return {**manifest, "metadata": {"note": "x"}, "files": listed, **changes}


def put(client: Any, content: bytes, offset: int = 0, sha256: str | None = None) -> Any:
    url = f"/api/v1/parts/{sha256 or digest(content)}"
    return client.put(url, params={"offset": offset}, content=content[offset:])


def send_parts(client: Any, files: dict[str, bytes]) -> None:
    for content in files.values():
        for i in range(0, len(content), PART):
            assert put(client, content[i : i + PART]).status_code in (200, 201)


def publish(
    client: Any, name: str, files: dict[str, bytes], step: int = 10, **changes: Any
) -> None:
    send_parts(client, files)
    manifest = manifest_of(name, files, step, **changes)
    answer = client.put(f"{URL}/{name}", json=manifest)
    deadline = time.monotonic() + 10
    while answer.status_code == 202 and time.monotonic() < deadline:
        answer = client.put(f"{URL}/{name}", json=manifest)
    assert (answer.status_code, answer.json()["state"]) == (200, "published"), answer.text


@pytest.fixture
def run(box: Any) -> Any:
    box.begin()
    return box


FILES = {"model.safetensors": os.urandom(4500), "sub/meta.json": b"{}", "empty": b""}


def test_a_checkpoint_goes_in_and_comes_out(run: Any) -> None:
    client = run.client
    manifest = manifest_of("step-10", FILES)
    parts = [part["sha256"] for file in manifest["files"] for part in file["parts"]]
    asked = client.post("/api/v1/parts/missing", json={"parts": parts}).json()
    assert asked == {"missing": parts, "partial": {}}
    answer = client.put(f"{URL}/step-10", json=manifest)
    assert (answer.status_code, answer.json()["state"]) == (409, "incomplete")
    assert answer.json()["missing"] == parts
    assert client.get(f"{URL}/step-10/files/model.safetensors").status_code == 404
    publish(client, "step-10", FILES)
    assert client.post("/api/v1/parts/missing", json={"parts": parts}).json()["missing"] == []
    for path, content in FILES.items():
        got = client.get(f"{URL}/step-10/files/{path}")
        assert (got.status_code, got.content) == (200, content)
        assert got.headers["etag"] == f'"{digest(content)}"'
    listed = client.get(URL).json()
    assert [(c["name"], c["state"], c["bytes"]) for c in listed] == [("step-10", "published", 4502)]
    whole = client.get(f"{URL}/step-10").json()
    assert whole["files"] == manifest["files"]
    assert whole["state"] == "published"


def test_part_of_a_file_can_be_asked_for(run: Any) -> None:
    publish(run.client, "c", FILES)
    content, url = FILES["model.safetensors"], f"{URL}/c/files/model.safetensors"
    for asked, start, end in [
        ("bytes=0-0", 0, 1),
        ("bytes=990-2010", 990, 2011),
        ("bytes=4000-", 4000, 4500),
        ("bytes=-7", 4493, 4500),
        ("bytes=4499-99999", 4499, 4500),
    ]:
        got = run.client.get(url, headers={"Range": asked})
        assert (got.status_code, got.content) == (206, content[start:end]), asked
        assert got.headers["content-range"] == f"bytes {start}-{end - 1}/4500"
    assert run.client.get(url, headers={"Range": "bytes=4500-"}).status_code == 416
    for ignored in ("bytes=0-1,5-6", "lines=1-2", "bytes=-"):
        assert run.client.get(url, headers={"Range": ignored}).status_code == 200
    tag = f'"{digest(content)}"'
    assert run.client.get(url, headers={"If-None-Match": tag}).status_code == 304
    other = {"Range": "bytes=0-1", "If-Range": '"other"'}
    assert run.client.get(url, headers=other).status_code == 200
    assert run.client.head(url).headers["content-length"] == "4500"


async def receive(
    run: Any, sha256: str, pieces: list[bytes], fault: Exception | None = None
) -> bool:
    """Let a server take a body that comes in pieces and may break off."""

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
        if fault is not None:
            raise fault

    new: bool = await run.client.app.state.server.blobs.receive(sha256, 0, None, body())
    return new


def test_a_cut_upload_goes_on_where_it_stopped(run: Any, data_dir: Path) -> None:
    content = os.urandom(3 * 2**20)
    sha256 = digest(content)
    pieces = [content[:700_000], content[700_000 : 2**20 + 5]]
    with pytest.raises(ClientDisconnect):
        asyncio.run(receive(run, sha256, pieces, ClientDisconnect()))
    partial = data_dir / "partial" / sha256
    asked = run.client.post("/api/v1/parts/missing", json={"parts": [sha256]}).json()
    assert asked == {"missing": [sha256], "partial": {sha256: 2**20 + 5}}
    again = put(run.client, content, 0)
    assert (again.status_code, again.json()["offset"]) == (409, 2**20 + 5)
    assert put(run.client, content, 2**20 + 5).status_code == 201
    assert put(run.client, content).status_code == 200
    assert (data_dir / "parts" / sha256[:2] / sha256).read_bytes() == content
    assert not partial.exists()


def test_two_uploads_of_one_part_do_not_mix(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(3 * 2**20)
    sha256 = digest(content)
    server = run.client.app.state.server

    async def race() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield content[: 2**20]
            begun.set()
            await go_on.wait()
            yield content[2**20 :]

        first = asyncio.create_task(server.blobs.receive(sha256, 0, None, slow()))
        await asyncio.wait_for(begun.wait(), 10)
        with pytest.raises(ApiError) as refused:  # the first is alive
            await receive(run, sha256, [content])
        assert refused.value.status == 503
        monkeypatch.setattr(blobs, "QUIET_SECONDS", 0.0)
        while server.blobs.find_missing([sha256])[1] != {sha256: 2**20}:
            await asyncio.sleep(0.01)

        async def rest() -> AsyncIterator[bytes]:  # the first seems dead: another goes on
            yield content[2**20 :]

        assert await server.blobs.receive(sha256, 2**20, None, rest())
        go_on.set()
        with pytest.raises(ApiError) as late:
            await asyncio.wait_for(first, 10)
        assert late.value.status == 409

    asyncio.run(race())
    assert server.blobs.path(sha256).read_bytes() == content
    assert put(run.client, content).status_code == 200


def test_wrong_bytes_are_dropped(run: Any, data_dir: Path) -> None:
    answer = put(run.client, b"something else", sha256=digest(b"wanted"))
    assert answer.status_code == 400
    assert not list((data_dir / "partial").iterdir())
    assert put(run.client, b"wanted").status_code == 201


def test_a_part_that_is_too_long_is_refused(run: Any, data_dir: Path) -> None:
    content = bytes(MAX_PART_BYTES + 1)
    assert put(run.client, content).status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(34):
            yield bytes(2**20)

    url = f"/api/v1/parts/{digest(bytes(34 * 2**20))}"
    assert run.client.put(url, content=pieces()).status_code == 413
    held = sum(path.stat().st_size for path in (data_dir / "partial").iterdir())
    assert held <= MAX_PART_BYTES


def test_a_full_disk_is_507(start: Callable[..., Any]) -> None:
    client = start(min_free_bytes=2**62)
    answer = put(client, b"content")
    assert answer.status_code == 507
    assert "prune" in answer.json()["error"]


def test_a_wrong_whole_hash_is_never_published(run: Any) -> None:
    send_parts(run.client, FILES)
    manifest = manifest_of("bad", FILES)
    manifest["files"][0]["sha256"] = digest(b"another file")
    answer = run.client.put(f"{URL}/bad", json=manifest)
    deadline = time.monotonic() + 10
    while answer.status_code == 202 and time.monotonic() < deadline:
        answer = run.client.put(f"{URL}/bad", json=manifest)
    assert (answer.status_code, answer.json()["state"]) == (422, "failed")
    assert run.client.get(f"{URL}/bad/files/model.safetensors").status_code == 404
    publish(run.client, "bad", FILES)  # the right manifest mends it


def test_a_part_that_decayed_on_the_server_is_asked_for_again(run: Any, data_dir: Path) -> None:
    send_parts(run.client, FILES)
    victim = digest(FILES["model.safetensors"][:PART])
    path = data_dir / "parts" / victim[:2] / victim
    path.write_bytes(bytes(PART))
    manifest = manifest_of("c", FILES)
    deadline = time.monotonic() + 10
    state = ""
    while state != "incomplete" and time.monotonic() < deadline:
        answer = run.client.put(f"{URL}/c", json=manifest).json()
        state = answer["state"]
    assert "damaged" in answer.get("error", "") or answer.get("missing") == [victim]
    publish(run.client, "c", FILES)


def test_another_manifest_under_a_published_name_is_refused(run: Any) -> None:
    publish(run.client, "c", FILES)
    publish(run.client, "c", FILES, aliases=["best"])
    assert run.client.get(f"{URL}/c").json()["aliases"] == ["best"]
    other = {"model.safetensors": b"other"}
    send_parts(run.client, other)
    answer = run.client.put(f"{URL}/c", json=manifest_of("c", other))
    assert answer.status_code == 409
    assert "another name" in answer.json()["error"]
    assert run.client.get(f"{URL}/c/files/model.safetensors").content == FILES["model.safetensors"]


def test_an_interrupted_verification_goes_on_after_a_restart(
    start: Callable[..., Any], make_box: Callable[..., Any]
) -> None:
    client = start()
    make_box(client).begin()
    send_parts(client, FILES)
    server = client.app.state.server  # type: ignore[attr-defined]
    server.checkpoints.stop()  # the server dies before it verifies
    answer = client.put(f"{URL}/c", json=manifest_of("c", FILES))
    assert (answer.status_code, answer.json()["state"]) == (202, "verifying")
    assert answer.json()["total_bytes"] == 4502
    assert client.get(f"{URL}/c/files/empty").status_code == 404
    client.__exit__(None, None, None)
    again = start()
    deadline = time.monotonic() + 10
    while again.get(f"{URL}/c").json()["state"] == "verifying" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert again.get(f"{URL}/c").json()["state"] == "published"


def test_unused_parts_go_after_a_day_and_used_ones_never(run: Any, data_dir: Path) -> None:
    publish(run.client, "kept", {"f": b"kept" * 100})
    publish(run.client, "gone", {"f": b"gone" * 100, "both": b"kept" * 100})
    put(run.client, b"in flight")
    assert run.client.delete(f"{URL}/gone").status_code == 200
    assert run.client.delete(f"{URL}/gone").status_code == 404
    parts = data_dir / "parts"
    old = time.time() - 2 * blobs.KEPT_SECONDS
    for path in parts.glob("*/*"):
        os.utime(path, (old, old))
    asked = {"parts": [digest(b"in flight")]}
    run.client.post("/api/v1/parts/missing", json=asked)  # somebody counts on it
    server = run.client.app.state.server  # type: ignore[attr-defined]
    assert collect_parts(server.database, server.blobs) == len(b"gone" * 100)
    left = {path.name for path in parts.glob("*/*")}
    assert left == {digest(b"kept" * 100), digest(b"in flight")}
    assert run.client.get(f"{URL}/kept/files/f").content == b"kept" * 100


def test_what_was_let_go_of_says_when_and_why_and_may_come_back(run: Any) -> None:
    publish(run.client, "c", FILES, step=1)
    publish(run.client, "d", {"f": b"d"}, step=2)
    before = time.time()
    rule = {"keep_last": 1, "run": RUN}
    assert run.client.post("/api/v1/prune", json=rule).json()["freed_bytes"] == 4502
    gone = run.client.get(f"{URL}/c").json()
    assert (gone["state"], gone["reason"]) == ("removed", "pruned by keep-last 1")
    assert before <= gone["removed"] <= time.time()
    assert gone["files"] == manifest_of("c", FILES)["files"]
    assert run.client.get(f"{URL}/c/files/empty").status_code == 404
    assert [c["name"] for c in run.client.get(URL).json()] == ["d"]
    publish(run.client, "c", FILES, step=1)
    assert "removed" not in run.client.get(f"{URL}/c").json()
    reason = {"reason": "replaced by a newer last"}
    assert run.client.delete(f"{URL}/c", params=reason).status_code == 200
    assert run.client.get(f"{URL}/c").json()["reason"] == "replaced by a newer last"
    assert run.client.delete(f"{URL}/d", params={"reason": "x" * 300}).status_code == 422
    publish(run.client, "c", {"f": b"another"}, step=3)  # the name is free again


def test_retention_rules_keep_what_they_say(run: Any) -> None:

    losses = {10: 5.0, 20: 2.0, 30: 3.0, 40: 4.0}
    run.send([run.metrics(step, {"val/bpb": loss}) for step, loss in losses.items()])
    for step in losses:
        publish(run.client, f"s{step}", {"f": bytes([step]) * 50, "same": b"same"}, step)
    rules = {"run": RUN, "keep_last": 1, "keep_best": "val/bpb", "mode": "min", "dry_run": True}
    plan = run.client.post("/api/v1/prune", json=rules).json()
    assert [c["name"] for c in plan["removed"]] == ["s10", "s30"]
    assert [c["name"] for c in plan["kept"]] == ["s20", "s40"]
    assert plan["freed_bytes"] == 100
    assert len(run.client.get(URL).json()) == 4
    unknown = run.client.post("/api/v1/prune", json={**rules, "keep_best": "unknown"}).json()
    assert unknown["removed"] == []
    assert run.client.post("/api/v1/prune", json={**rules, "dry_run": False}).json() == plan
    assert [c["name"] for c in run.client.get(URL).json()] == ["s20", "s40"]
    every = {"run": RUN, "keep_every": 40}
    removed = run.client.post("/api/v1/prune", json=every).json()["removed"]
    assert [c["name"] for c in removed] == ["s20"]
    for wrong in ({}, {"keep_last": 0}, {"keep_last": 1, "mode": "best"}, {"keep_best": 7}):
        assert run.client.post("/api/v1/prune", json=wrong).status_code == 422


def test_what_was_saved_to_be_kept_is_neither_removed_nor_counted(run: Any) -> None:
    publish(run.client, "tokenizer", {"f": b"ranks"}, step=0, aliases=["keep"])
    for step in (10, 20):
        publish(run.client, f"s{step}", {"f": bytes([step])}, step)
    publish(run.client, "config", {"f": b"late"}, step=30, aliases=["keep"])
    plan = run.client.post("/api/v1/prune", json={"run": RUN, "keep_last": 1}).json()
    assert [c["name"] for c in plan["removed"]] == ["s10"]
    assert [c["name"] for c in plan["kept"]] == ["tokenizer", "s20", "config"]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"protocol": 1},
        {"files": []},
        {"files": [{"path": "../x", "bytes": 0, "sha256": "0" * 64, "parts": []}]},
        {"files": [{"path": "/etc/x", "bytes": 0, "sha256": "0" * 64, "parts": []}]},
        {"files": [{"path": "x", "bytes": 5, "sha256": "0" * 64, "parts": []}]},
    ],
)
def test_a_manifest_that_is_none_is_refused(run: Any, change: dict[str, Any]) -> None:
    answer = run.client.put(f"{URL}/c", json={**manifest_of("c", FILES), **change})
    assert answer.status_code == 422
    assert run.client.get(URL).json() == []
