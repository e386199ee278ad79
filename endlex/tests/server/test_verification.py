"""Verification: what is wrong or decayed is found, and a restart begins again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUN = "testrun001"
URL = f"/api/v1/runs/{RUN}/checkpoints"
FILES = {"model.safetensors": os.urandom(4500), "sub/meta.json": b"{}", "empty": b""}
PART = 1000


def test_a_wrong_whole_hash_is_never_published(run: Any) -> None:
    run.send_parts(FILES)
    manifest = run.manifest_of("bad", FILES)
    manifest["files"][0]["sha256"] = run.sha256_of(b"another file")
    answer = run.put_manifest("bad", manifest)
    assert (answer.status_code, answer.json()["state"]) == (422, "failed")
    assert run.client.get(f"{URL}/bad/files/model.safetensors").status_code == 404
    run.publish("bad", FILES)  # the right manifest mends it


def test_a_part_that_decayed_on_the_server_is_asked_for_again(run: Any, data_dir: Path) -> None:
    run.send_parts(FILES)
    victim = run.sha256_of(FILES["model.safetensors"][:PART])
    path = data_dir / "parts" / victim[:2] / victim
    path.write_bytes(bytes(PART))
    answer = run.put_manifest("c", run.manifest_of("c", FILES)).json()
    assert answer["state"] == "incomplete"
    assert "damaged" in answer.get("error", "") or answer.get("missing") == [victim]
    run.publish("c", FILES)


def test_a_damaged_part_that_a_file_has_twice_is_asked_for_again(run: Any, data_dir: Path) -> None:
    piece = os.urandom(PART)
    run.send_parts({"f": piece * 2})
    victim = run.sha256_of(piece)
    (data_dir / "parts" / victim[:2] / victim).write_bytes(bytes(PART))
    run.client.put(f"{URL}/c", json=run.manifest_of("c", {"f": piece * 2}))
    deadline = time.monotonic() + 10
    while (state := run.client.get(f"{URL}/c").json()["state"]) == "verifying":
        assert time.monotonic() < deadline, "it is verified for ever"
        time.sleep(0.01)
    assert state == "incomplete"
    run.publish("c", {"f": piece * 2})


def test_an_interrupted_verification_goes_on_after_a_restart(
    start: Callable[..., Any], make_box: Callable[..., Any]
) -> None:
    client = start()
    run = make_box(client)
    run.begin()
    run.send_parts(FILES)
    server = client.app.state.server  # type: ignore[attr-defined]
    server.checkpoints.stop()  # the server dies before it verifies
    answer = client.put(f"{URL}/c", json=run.manifest_of("c", FILES))
    assert (answer.status_code, answer.json()["state"]) == (202, "verifying")
    assert answer.json()["total_bytes"] == 4502
    assert client.get(f"{URL}/c/files/empty").status_code == 404
    client.__exit__(None, None, None)
    again = start()
    deadline = time.monotonic() + 10
    while again.get(f"{URL}/c").json()["state"] == "verifying" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert again.get(f"{URL}/c").json()["state"] == "published"
