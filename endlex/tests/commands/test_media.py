"""A picture goes to the server with its run, and `endlex verify` knows whether it did."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import endlex
from endlex.client.transport import Transport


def test_a_picture_is_sent_verified_and_shown(cli: Any, place: Path, server: str) -> None:
    run = endlex.init("media", "d12", mode="offline")
    run.log_image("sample", np.zeros((2, 2), np.uint8), step=3)
    page = place / "page.svg"
    page.write_text("<svg/>")
    run.log_file("drawing", page, step=3)
    run.finish()
    status, out, _ = cli("verify", run.directory, "--url", server)
    assert (status, "media sample: one of its files is not sent yet" in out) == (1, True)
    assert cli("sync", run.directory, "--url", server)[0] == 0
    assert cli("verify", run.directory, "--url", server)[0] == 0
    assert not list((run.directory / "media").iterdir())  # type: ignore[operator]
    transport = Transport(server)
    found = transport.request("GET", f"/runs/{run.id}/media").content["media"]
    assert [(m["name"], m["step"], m["kind"]) for m in found] == [
        ("drawing", 3, "image"),
        ("sample", 3, "image"),
    ]
    with transport.download(f"/runs/{run.id}/media/{found[1]['id']}") as blocks:
        assert b"".join(blocks).startswith(b"\x89PNG")
    with transport.download(f"/runs/{run.id}/media/{found[1]['id']}", start=1, end=4) as blocks:
        assert b"".join(blocks) == b"PNG"


def test_an_online_run_sends_its_pictures(
    online: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = endlex.init("media", "live")
    run.log({"loss": 1.0})
    run.log_image("sample", np.ones((2, 2), np.uint8), step=0)
    run.finish()
    assert run.url == f"{online}/runs/{run.id}"
    deadline = time.monotonic() + 20
    while list((run.directory / "media").iterdir()) and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.05)
    assert not list((run.directory / "media").iterdir())  # type: ignore[operator]


def test_a_damaged_file_is_named_and_may_be_given_up(cli: Any, place: Path, online: str) -> None:
    run = endlex.init("media", "damaged", mode="offline")
    for name in ("good", "bad"):
        (place / name).write_text(name)
        run.log_file(name, place / name, step=1)
    run.finish()
    assert run.directory is not None
    kept = run.directory / "media" / hashlib.sha256(b"bad").hexdigest()
    kept.write_bytes(b"b")
    for _ in range(2):  # the first one sends the other file
        status, out, _ = cli("sync", run.directory)
        assert status == 1
        assert "damaged before it was sent" in out
    status, out, _ = cli("verify", run.directory)
    assert (status, "media bad: one of its files was damaged" in out) == (1, True)
    assert f"endlex sync {run.directory} --drop-failed" in out
    assert "media good" not in out
    assert cli("sync", run.directory, "--drop-failed")[0] == 0
    status, out, _ = cli("verify", run.directory)
    assert (status, f"could not be sent: {kept.name}" in out) == (0, True)
    assert not list((run.directory / "media").iterdir())


def test_a_damaged_file_that_was_logged_again_and_sent_is_not_missing(
    cli: Any, place: Path, online: str
) -> None:
    run = endlex.init("media", "again", mode="offline")
    sound = place / "sound.wav"
    sound.write_bytes(b"RIFF")
    run.log_file("first", sound, step=1)
    assert run.directory is not None
    kept = run.directory / "media" / hashlib.sha256(b"RIFF").hexdigest()
    kept.write_bytes(b"R")
    assert cli("sync", run.directory)[0] == 1
    run.log_file("second", sound, step=2)
    run.finish()
    status, out, _ = cli("verify", run.directory)
    assert (status, "media second: one of its files is not sent yet" in out) == (1, True)
    assert cli("sync", run.directory)[0] == 0
    assert kept.with_suffix(".damaged").exists()
    status, out, _ = cli("verify", run.directory)
    assert (status, out.splitlines()[-1].startswith("safe to tear down")) == (0, True)
