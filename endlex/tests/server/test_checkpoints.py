"""Manifests: what is published is whole, and nothing else can be seen."""

from __future__ import annotations

import os
from typing import Any

import pytest

RUN = "testrun001"
URL = f"/api/v1/runs/{RUN}/checkpoints"
FILES = {"model.safetensors": os.urandom(4500), "sub/meta.json": b"{}", "empty": b""}


def test_a_checkpoint_goes_in_and_comes_out(run: Any) -> None:
    client = run.client
    manifest = run.manifest_of("step-10", FILES)
    parts = [part["sha256"] for file in manifest["files"] for part in file["parts"]]
    asked = client.post("/api/v1/parts/missing", json={"parts": parts}).json()
    assert asked == {"missing": parts, "partial": {}}
    answer = client.put(f"{URL}/step-10", json=manifest)
    assert (answer.status_code, answer.json()["state"]) == (409, "incomplete")
    assert answer.json()["missing"] == parts
    assert client.get(f"{URL}/step-10/files/model.safetensors").status_code == 404
    run.publish("step-10", FILES)
    assert client.post("/api/v1/parts/missing", json={"parts": parts}).json()["missing"] == []
    for path, content in FILES.items():
        got = client.get(f"{URL}/step-10/files/{path}")
        assert (got.status_code, got.content) == (200, content)
        assert got.headers["etag"] == f'"{run.sha256_of(content)}"'
    listed = client.get(URL).json()
    assert [(c["name"], c["state"], c["bytes"]) for c in listed] == [("step-10", "published", 4502)]
    whole = client.get(f"{URL}/step-10").json()
    assert whole["files"] == manifest["files"]
    assert whole["state"] == "published"


def test_part_of_a_file_can_be_asked_for(run: Any) -> None:
    run.publish("c", FILES)
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
    tag = f'"{run.sha256_of(content)}"'
    assert run.client.get(url, headers={"If-None-Match": tag}).status_code == 304
    other = {"Range": "bytes=0-1", "If-Range": '"other"'}
    assert run.client.get(url, headers=other).status_code == 200
    assert run.client.head(url).headers["content-length"] == "4500"


def test_another_manifest_under_a_published_name_is_refused(run: Any) -> None:
    run.publish("c", FILES)
    run.publish("c", FILES, aliases=["best"])
    assert run.client.get(f"{URL}/c").json()["aliases"] == ["best"]
    other = {"model.safetensors": b"other"}
    run.send_parts(other)
    answer = run.client.put(f"{URL}/c", json=run.manifest_of("c", other))
    assert answer.status_code == 409
    assert "another name" in answer.json()["error"]
    assert run.client.get(f"{URL}/c/files/model.safetensors").content == FILES["model.safetensors"]


def test_an_alias_is_listed_with_the_newest_checkpoint_alone(run: Any) -> None:
    for name, created, aliases in (("a", 1.0, ["last", "keep"]), ("b", 3.0, ["last", "best"])):
        run.publish(name, FILES, created=created, aliases=aliases)
    run.publish("late", FILES, step=99, created=2.0, aliases=["best", "keep"])
    listed = {c["name"]: c["aliases"] for c in run.client.get(URL).json()}
    assert listed == {"a": ["keep"], "b": ["last", "best"], "late": ["keep"]}


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
    answer = run.client.put(f"{URL}/c", json={**run.manifest_of("c", FILES), **change})
    assert answer.status_code == 422
    assert run.client.get(URL).json() == []
