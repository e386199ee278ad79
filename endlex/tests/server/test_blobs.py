"""Parts: a cut upload goes on, two of one part do not mix, and what is wrong is dropped."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from endlex.protocol import MAX_PART_BYTES
from endlex.server.errors import ApiError


async def receive(
    run: Any, sha256: str, pieces: list[bytes], fault: Exception | None = None
) -> bool:
    """Let a server take a body that comes in pieces and may break off."""

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
        if fault is not None:
            raise fault

    new: bool = await run.client.app.state.server.blobs.receive(sha256, 0, 0, body())
    return new


def test_a_cut_upload_goes_on_where_it_stopped(run: Any, data_dir: Path) -> None:
    content = os.urandom(3 * 2**20)
    sha256 = run.sha256_of(content)
    pieces = [content[:700_000], content[700_000 : 2**20 + 5]]
    with pytest.raises(ClientDisconnect):
        asyncio.run(receive(run, sha256, pieces, ClientDisconnect()))
    partial = data_dir / "partial" / sha256
    asked = run.client.post("/api/v1/parts/missing", json={"parts": [sha256]}).json()
    assert asked == {"missing": [sha256], "partial": {sha256: 2**20 + 5}}
    again = run.put_part(content, 0)
    assert (again.status_code, again.json()["offset"]) == (409, 2**20 + 5)
    assert run.put_part(content, 2**20 + 5).status_code == 201
    assert run.put_part(content).status_code == 200
    assert (data_dir / "parts" / sha256[:2] / sha256).read_bytes() == content
    assert not partial.exists()


def test_two_uploads_of_one_part_do_not_mix(run: Any) -> None:
    content = os.urandom(3 * 2**20)
    sha256 = run.sha256_of(content)
    server = run.client.app.state.server

    async def race() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield content[: 2**20]
            begun.set()
            await go_on.wait()
            yield content[2**20 :]

        first = asyncio.create_task(server.blobs.receive(sha256, 0, 0, slow()))
        await asyncio.wait_for(begun.wait(), 10)
        with pytest.raises(ApiError) as refused:
            await receive(run, sha256, [content])
        assert refused.value.status == 429
        go_on.set()
        assert await asyncio.wait_for(first, 10)

    asyncio.run(race())
    assert server.blobs.path(sha256).read_bytes() == content
    assert run.put_part(content).status_code == 200


def test_wrong_bytes_are_dropped(run: Any, data_dir: Path) -> None:
    answer = run.put_part(b"something else", sha256=run.sha256_of(b"wanted"))
    assert answer.status_code == 400
    assert not list((data_dir / "partial").iterdir())
    assert run.put_part(b"wanted").status_code == 201


def test_a_part_that_is_too_long_is_refused(run: Any, data_dir: Path) -> None:
    content = bytes(MAX_PART_BYTES + 1)
    assert run.put_part(content).status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(34):
            yield bytes(2**20)

    url = f"/api/v1/parts/{run.sha256_of(bytes(34 * 2**20))}"
    assert run.client.put(url, content=pieces()).status_code == 413
    held = sum(path.stat().st_size for path in (data_dir / "partial").iterdir())
    assert held <= MAX_PART_BYTES


def test_a_full_disk_is_507(start: Callable[..., Any], make_box: Callable[..., Any]) -> None:
    answer = make_box(start(min_free_bytes=2**62)).put_part(b"content")
    assert answer.status_code == 507
    assert "prune" in answer.json()["error"]
