"""Retention: rules keep what they say, and nothing that is used is removed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from endlex.server.store import blobs
from endlex.server.store.retention import collect_parts

RUN = "testrun001"
URL = f"/api/v1/runs/{RUN}/checkpoints"
FILES = {"model.safetensors": os.urandom(4500), "sub/meta.json": b"{}", "empty": b""}


def test_unused_parts_go_after_a_day_and_used_ones_never(run: Any, data_dir: Path) -> None:
    run.publish("kept", {"f": b"kept" * 100})
    run.publish("gone", {"f": b"gone" * 100, "both": b"kept" * 100})
    run.put_part(b"in flight")
    assert run.client.delete(f"{URL}/gone").status_code == 200
    assert run.client.delete(f"{URL}/gone").status_code == 404
    parts = data_dir / "parts"
    old = time.time() - 2 * blobs.KEPT_SECONDS
    for path in parts.glob("*/*"):
        os.utime(path, (old, old))
    asked = {"parts": [run.sha256_of(b"in flight")]}
    run.client.post("/api/v1/parts/missing", json=asked)  # somebody counts on it
    server = run.client.app.state.server  # type: ignore[attr-defined]
    collect_parts(server.database, server.blobs)
    left = {path.name for path in parts.glob("*/*")}
    assert left == {run.sha256_of(b"kept" * 100), run.sha256_of(b"in flight")}
    assert run.client.get(f"{URL}/kept/files/f").content == b"kept" * 100


def test_a_manifest_that_is_sent_again_keeps_no_part_for_longer(run: Any, data_dir: Path) -> None:
    run.publish("c", FILES)
    old = time.time() - 2 * blobs.KEPT_SECONDS
    for path in (data_dir / "parts").glob("*/*"):
        os.utime(path, (old, old))
    assert run.put_manifest("c", run.manifest_of("c", FILES)).status_code == 200
    assert run.client.delete(f"{URL}/c").status_code == 200
    server = run.client.app.state.server  # type: ignore[attr-defined]
    assert list((data_dir / "parts").glob("*/*"))
    collect_parts(server.database, server.blobs)
    assert not list((data_dir / "parts").glob("*/*"))


def test_what_was_let_go_of_says_when_and_why_and_may_come_back(run: Any) -> None:
    run.publish("c", FILES, step=1)
    run.publish("d", {"f": b"d"}, step=2)
    before = time.time()
    rule = {"keep_last": 1, "run": RUN}
    assert run.client.post("/api/v1/prune", json=rule).json()["freed_bytes"] == 4502
    gone = run.client.get(f"{URL}/c").json()
    assert (gone["state"], gone["reason"]) == ("removed", "pruned by keep-last 1")
    assert before <= gone["removed"] <= time.time()
    assert gone["files"] == run.manifest_of("c", FILES)["files"]
    assert run.client.get(f"{URL}/c/files/empty").status_code == 404
    assert [c["name"] for c in run.client.get(URL).json()] == ["d"]
    run.publish("c", FILES, step=1)
    assert "removed" not in run.client.get(f"{URL}/c").json()
    reason = {"reason": "replaced by a newer last"}
    assert run.client.delete(f"{URL}/c", params=reason).status_code == 200
    assert run.client.get(f"{URL}/c").json()["reason"] == "replaced by a newer last"
    assert run.client.delete(f"{URL}/d", params={"reason": "x" * 300}).status_code == 422
    run.publish("c", {"f": b"another"}, step=3)  # the name is free again


def test_retention_rules_keep_what_they_say(run: Any) -> None:

    losses = {10: 5.0, 20: 2.0, 30: 3.0, 40: 4.0}
    run.send([run.metrics(step, {"val/bpb": loss}) for step, loss in losses.items()])
    for step in losses:
        run.publish(f"s{step}", {"f": bytes([step]) * 50, "same": b"same"}, step)
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
    for project, number in (("tests", 2), ("another", 0)):
        looked = {"project": project, "keep_last": 9, "dry_run": True}
        assert len(run.client.post("/api/v1/prune", json=looked).json()["kept"]) == number
    every = {"run": RUN, "keep_every": 40}
    removed = run.client.post("/api/v1/prune", json=every).json()["removed"]
    assert [c["name"] for c in removed] == ["s20"]
    refused = (
        {},
        {"keep_last": 0},
        {"keep_last": 1, "mode": "best"},
        {"keep_best": 7},
        {"keep_best": ""},
    )
    for wrong in refused:
        assert run.client.post("/api/v1/prune", json=wrong).status_code == 422


def test_what_was_saved_to_be_kept_is_neither_removed_nor_counted(run: Any) -> None:
    run.publish("tokenizer", {"f": b"ranks"}, step=0, aliases=["keep"])
    for step in (10, 20):
        run.publish(f"s{step}", {"f": bytes([step])}, step)
    run.publish("config", {"f": b"late"}, step=30, aliases=["keep"])
    plan = run.client.post("/api/v1/prune", json={"run": RUN, "keep_last": 1}).json()
    assert [c["name"] for c in plan["removed"]] == ["s10"]
    assert [c["name"] for c in plan["kept"]] == ["tokenizer", "s20", "config"]
