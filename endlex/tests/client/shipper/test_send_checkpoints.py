"""Saved files arrive whole or are reported; what the server has is not sent again."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import endlex
from endlex.client import checkpoints
from endlex.client.checkpoints import (
    CheckpointFailed,
    FileChanged,
    Staged,
    build_manifest,
    manifest_path,
    note_path,
    read_note,
    staged_change,
    staged_manifest,
    staged_names,
)
from endlex.client.shipper import send_checkpoints
from endlex.client.shipper.control import wait_until_shipped
from endlex.client.shipper.send_checkpoints import (
    ALL_MEDIA,
    CheckpointShipper,
    Uploader,
    in_parallel,
)
from endlex.client.transport import Refused, Retry, Transport
from endlex.reading import read_run, session_files

PART = 64 * 1024
NOTE: Staged = {
    "name": "step_1",
    "step": 1,
    "created": 1.0,
    "aliases": [],
    "metadata": {},
    "files": [],
}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "PART_BYTES", PART)
    monkeypatch.setattr("endlex.client.transport.SEND_BYTES", 8 * 1024)
    monkeypatch.setattr(send_checkpoints, "VERIFY_SECONDS", (0.001, 0.01))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[endlex.Run]:
    with endlex.init("p", "d4", directory=tmp_path / "run", id="abcdefgh") as opened:
        yield opened


def content(size: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(str(seed).encode()).digest(size)


def checkpoint(folder: Path, *sizes: int) -> Path:
    for number, size in enumerate(sizes):
        path = folder / "deep" / f"shard{number}.bin" if number else folder / "model.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(size, number))
    return folder


def send(run: endlex.Run, name: str, transport: Transport) -> list[tuple[int, int]]:
    told: list[tuple[int, int]] = []
    assert run.directory is not None
    while True:
        try:
            uploader = Uploader(transport, lambda done, total: told.append((done, total)))
            uploader.send_staged(run.directory, run.id, name)
            return told
        except Retry:
            continue


def published(stub: Any, name: str) -> dict[str, bytes]:
    manifest = stub.manifests["abcdefgh", name]
    return {
        file["path"]: b"".join(stub.parts[part["sha256"]] for part in file["parts"])
        for file in manifest["files"]
    }


def test_a_directory_arrives_whole_and_a_second_time_for_nothing(
    stub: Any, transport: Transport, run: endlex.Run, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "step_7", 5 * PART + 11, 3 * PART, 0)
    name = run.save(source, step=7, aliases=["last"], metadata={"loss": float("nan")})
    assert name == "step_7"
    shutil.rmtree(source)
    told = send(run, name, transport)
    assert published(stub, name) == {
        "model.bin": content(5 * PART + 11),
        "deep/shard1.bin": content(3 * PART, 1),
        "deep/shard2.bin": b"",
    }
    total = 8 * PART + 11
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert stub.part_bytes_received == total
    assert staged_names(run.directory) == []  # type: ignore[arg-type]
    manifest = json.loads(manifest_path(run.directory, name).read_text())  # type: ignore[arg-type]
    assert (manifest["step"], manifest["aliases"]) == (7, ["last"])
    assert manifest["metadata"] == {"loss": "NaN"}
    again = run.save(checkpoint(tmp_path / "step_7", 5 * PART + 11, 3 * PART, 0), step=7)
    assert again == "step_7-2"
    send(run, again, transport)
    assert stub.part_bytes_received == total
    assert published(stub, again) == published(stub, name)
    records = [r for r in read_run(run.directory) if r["type"] == "checkpoint"]  # type: ignore[arg-type]
    assert [r["name"] for r in records] == [name, again]
    sizes = {file["path"]: file["bytes"] for file in records[0]["files"]}
    assert sizes == {"model.bin": 5 * PART + 11, "deep/shard1.bin": 3 * PART, "deep/shard2.bin": 0}


def test_a_cut_costs_at_most_the_part_that_was_cut(
    stub: Any, transport: Transport, run: endlex.Run, tmp_path: Path
) -> None:
    name = run.save(checkpoint(tmp_path / "step_1", 20 * PART), step=1)
    stub.cut_part_after = [0, 1, PART // 2, PART - 1, PART, 10_000] * 3
    cuts = len(stub.cut_part_after)
    send(run, name, transport)
    assert not stub.cut_part_after
    assert published(stub, name) == {"model.bin": content(20 * PART)}
    assert stub.part_bytes_received <= 20 * PART + cuts * PART


@pytest.mark.parametrize("fault", ["cut", 503, 507, 500])
def test_faults_of_every_kind_of_request(
    stub: Any, transport: Transport, run: endlex.Run, tmp_path: Path, fault: int | str
) -> None:
    name = run.save(checkpoint(tmp_path / "step_1", 6 * PART, PART), step=1)
    seen: dict[tuple[str, str, str], int] = {}

    def every_second(when: str) -> Any:
        def decide(method: str, path: str) -> int | str | None:
            key = (when, method, path)
            seen[key] = seen.get(key, 0) + 1
            return fault if seen[key] % 2 else None

        return decide

    stub.before, stub.after = every_second("before"), every_second("after")
    send(run, name, transport)
    assert published(stub, name)["model.bin"] == content(6 * PART)


@pytest.mark.parametrize("when", ["before hashing", "after hashing", "shorter"])
def test_a_file_rewritten_in_place_is_reported_and_never_published(
    stub: Any,
    transport: Transport,
    run: endlex.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    monkeypatch.setattr(checkpoints, "_clone", lambda *_: False)  # links, on any file system
    source = checkpoint(tmp_path / "step_1", 3 * PART)
    name = run.save(source, step=1, link=True)
    if when == "after hashing":
        staged_manifest(run.directory, read_note(run.directory, name))  # type: ignore[arg-type]
    with (source / "model.bin").open("r+b") as file:
        file.write(b"changed")
        if when == "shorter":
            file.truncate(PART)
    os.utime(source / "model.bin", ns=(1, 1))
    with pytest.raises(FileChanged, match=r"file changed: 'model\.bin' was rewritten in place"):
        send(run, name, transport)
    assert stub.manifests == {}


def test_links_that_were_rewritten_are_saved_again_without_links(
    run: endlex.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_clone", lambda *_: False)
    source = checkpoint(tmp_path / "step_1", PART)
    name = run.save(source, step=1, link=True)
    assert run.directory is not None
    assert staged_change(run.directory, name) is None
    (source / "model.bin").write_bytes(b"changed")
    found = str(staged_change(run.directory, name))
    assert found.endswith("link=True: save it again, without that")


def test_a_note_with_more_than_is_known_changes_nothing(
    stub: Any, transport: Transport, run: endlex.Run, tmp_path: Path
) -> None:
    name = run.save(checkpoint(tmp_path / "step_1", PART), step=1)
    assert run.directory is not None
    path = note_path(run.directory, name)
    note = json.loads(path.read_bytes())
    note["host"], note["files"][0]["mode"] = "box", 0o644  # such as a later version's
    path.write_text(json.dumps(note))
    assert staged_change(run.directory, name) is None
    send(run, name, transport)
    assert "host" not in stub.manifests["abcdefgh", name]
    assert published(stub, name) == {"model.bin": content(PART)}


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="there is no /proc here")
def test_a_file_that_holds_more_than_its_size_says_is_no_checkpoint() -> None:
    file = Path("/proc/cpuinfo")
    with file.open("rb") as kept:  # for as long as it is open, its times stay
        described = checkpoints.describe_file(file.name, os.fstat(kept.fileno()))
        with pytest.raises(FileChanged):
            build_manifest(file.parent, {**NOTE, "files": [described]})


def test_a_change_that_the_time_does_not_show_is_found_by_the_hash(
    stub: Any, transport: Transport, run: endlex.Run, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(checkpoints, "_clone", lambda *arguments: False)
    source = checkpoint(tmp_path / "step_1", 3 * PART)
    name = run.save(source, step=1, link=True)
    staged_manifest(run.directory, read_note(run.directory, name))  # type: ignore[arg-type]
    before = (source / "model.bin").stat()
    with (source / "model.bin").open("r+b") as file:
        file.write(b"changed")
    os.utime(source / "model.bin", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(FileChanged):
        send(run, name, transport)
    assert stub.manifests == {}


def test_ctrl_c_while_threads_begin_ends_what_they_do(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending, done = threading.Event(), list[int]()

    class Pool(ThreadPoolExecutor):
        def submit(self, *arguments: Any) -> Any:  # type: ignore[override]
            if self._threads:
                raise KeyboardInterrupt
            return super().submit(*arguments)

        def shutdown(self, *arguments: Any, **options: Any) -> None:
            ending.set()
            super().shutdown(*arguments, **options)

    def act(item: int) -> None:
        ending.wait()
        done.append(item)

    monkeypatch.setattr(send_checkpoints, "ThreadPoolExecutor", Pool)
    with pytest.raises(KeyboardInterrupt):
        in_parallel(act, range(1000), 2, transport)
    assert len(done) <= 1


def test_a_replaced_file_is_kept_as_it_was(
    stub: Any, transport: Transport, run: endlex.Run, tmp_path: Path
) -> None:
    last = tmp_path / "last.bin"
    last.write_bytes(content(100))
    name = run.save(last, step=3)
    assert name == "last.bin-3"
    (tmp_path / "new").write_bytes(content(100, 1))
    (tmp_path / "new").replace(last)
    send(run, name, transport)
    assert published(stub, name) == {"last.bin": content(100)}


def test_without_links_files_are_copied(
    stub: Any, transport: Transport, run: endlex.Run, tmp_path: Path, monkeypatch: Any
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(checkpoints, "_clone", lambda *arguments: False)
    monkeypatch.setattr(os, "link", refuse)
    source = checkpoint(tmp_path / "step_1", 1000)
    name = run.save(source, step=1, link=True)
    with (source / "model.bin").open("r+b") as file:
        file.write(b"changed")
    send(run, name, transport)
    assert published(stub, name) == {"model.bin": content(1000)}


def test_a_trainer_that_writes_each_checkpoint_over_the_one_before_loses_none(
    stub: Any, transport: Transport, run: endlex.Run, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(checkpoints, "_clone", lambda *arguments: False)
    names = []
    for step in range(3):
        (tmp_path / "last.pt").write_bytes(content(1000 + step))
        names.append(run.save(tmp_path / "last.pt", step=step))
    for step, name in enumerate(names):
        send(run, name, transport)
        assert published(stub, name) == {"last.pt": content(1000 + step)}


def test_without_room_for_a_copy_a_link_is_taken(
    stub: Any, transport: Transport, run: endlex.Run, tmp_path: Path, monkeypatch: Any
) -> None:
    def fill_the_disk(source: Path, target: Path) -> None:
        target.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(checkpoints, "_clone", lambda *arguments: False)
    monkeypatch.setattr(shutil, "copy2", fill_the_disk)
    (tmp_path / "last.pt").write_bytes(content(1000))
    name = run.save(tmp_path / "last.pt", step=1)
    send(run, name, transport)
    assert published(stub, name) == {"last.pt": content(1000)}


def test_another_checkpoint_under_the_name_is_a_failure(
    stub: Any, transport: Transport, run: endlex.Run, tmp_path: Path
) -> None:
    name = run.save(checkpoint(tmp_path / "a", 10), step=1, name="best")
    send(run, name, transport)
    shutil.rmtree(run.directory / "manifests")  # type: ignore[operator]
    name = run.save(checkpoint(tmp_path / "b", 11), step=2, name="best")
    with pytest.raises(CheckpointFailed, match="another checkpoint has this name"):
        send(run, name, transport)


def test_a_token_without_the_scope_is_refused(
    stub: Any, transport: Transport, run: endlex.Run, tmp_path: Path
) -> None:
    stub.before = lambda method, path: 403 if "checkpoints" in path else None
    name = run.save(checkpoint(tmp_path / "a", 10), step=1)
    with pytest.raises(Refused, match="403"):
        send(run, name, transport)
    assert staged_names(run.directory) == [name]  # type: ignore[arg-type]


def test_the_thread_sends_in_order_and_goes_on_after_failures(
    stub: Any, transport: Transport, run: endlex.Run, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("endlex.client.shipper.send_checkpoints.STAGED_POLL_SECONDS", 0.01)
    monkeypatch.setattr(checkpoints, "_clone", lambda *arguments: False)
    names = [
        run.save(checkpoint(tmp_path / f"step_{step}", 100 + step), step=step, link=True)
        for step in range(3)
    ]
    (tmp_path / "step_1" / "model.bin").write_bytes(b"changed")
    assert run.directory is not None
    note = read_note(run.directory, names[0])
    assert [file["bytes"] for file in note["files"]] == [100]
    shipper = CheckpointShipper(run.directory, run.id, transport, ready=lambda: True)
    shipper.start()
    stub.wait_for(lambda: len(stub.manifests) == 2)
    shipper.stop()
    states = {name: state["state"] for name, state in shipper.states.items()}
    assert states["step_1"] == "failed"
    assert "file changed" in shipper.states["step_1"]["error"]
    assert states["step_0"] == "published"
    assert [name for _, name in stub.manifests] == ["step_0", "step_2"]
    assert "step_1" in staged_names(run.directory)


def test_a_disk_without_permissions_keeps_a_copy(
    run: endlex.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    for call in ("chmod", "link"):  # as exFAT answers
        monkeypatch.setattr(os, call, refuse)
    source = checkpoint(tmp_path / "step_1", 10)
    name = run.save(source, step=1)
    kept = run.directory / "staged" / name  # type: ignore[operator]
    assert {p.name: p.read_bytes() for p in kept.iterdir()} == {
        p.name: p.read_bytes() for p in source.iterdir()
    }


def log_files(run: endlex.Run, tmp_path: Path, *contents: bytes) -> list[Path]:
    """Log files, and return where the run keeps each."""
    kept = []
    for number, inside in enumerate(contents):
        path = tmp_path / f"{number}.wav"
        path.write_bytes(inside)
        run.log_file(f"sound{number}", path)
        kept.append(run.directory / "media" / hashlib.sha256(inside).hexdigest())  # type: ignore[operator]
    return kept


@pytest.mark.parametrize("damage", [b"other", b"longer than it was", b""])
def test_a_damaged_logged_file_is_put_aside_and_the_others_arrive(
    stub: Any,
    transport: Transport,
    run: endlex.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: bytes,
) -> None:
    monkeypatch.setattr("endlex.client.shipper.control.FINISH_SECONDS", 0.0)
    damaged, good = log_files(run, tmp_path, b"RIFF1", b"RIFF2")
    damaged.write_bytes(damage)
    assert run.directory is not None
    shipper = CheckpointShipper(run.directory, run.id, transport)
    shipper._send_waiting()
    assert stub.parts == {good.name: b"RIFF2"}
    assert shipper.waiting() == [], "nothing keeps the shipper alive"
    said = shipper.states[ALL_MEDIA]["error"]
    assert said == f"a logged file was damaged before it was sent: {damaged}.damaged"
    wait_until_shipped(run.directory, session_files(run.directory)[0])
    assert f"damaged before it was sent: media/{damaged.name}.damaged" in capsys.readouterr().err
    again, other = log_files(run, tmp_path, b"RIFF1", b"RIFF3")
    assert again == damaged
    shipper._send_waiting()
    assert set(stub.parts) == {damaged.name, good.name, other.name}
    assert shipper.states[ALL_MEDIA]["state"] == "published"


@pytest.mark.parametrize("fault", [503, 403, "disk"])
def test_faults_of_media_hold_up_no_checkpoint(
    stub: Any,
    transport: Transport,
    run: endlex.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: int | str,
) -> None:
    (picture,) = log_files(run, tmp_path, b"RIFF")
    name = run.save(checkpoint(tmp_path / "step_1", 100), step=1)
    assert run.directory is not None
    shipper = CheckpointShipper(run.directory, run.id, transport)
    with monkeypatch.context() as faulty:
        if fault == "disk":
            faulty.setattr(Uploader, "send_media", lambda *_: fail_to_read())
        stub.before = lambda method, path: fault if picture.name in path else None
        shipper._send_waiting()
    assert list(stub.manifests) == [(run.id, name)]
    assert shipper.states[ALL_MEDIA]["state"] in ("waiting", "refused")
    stub.before = lambda method, path: None
    monkeypatch.setattr(shipper, "_media_at", 0.0)
    shipper._send_waiting()
    assert picture.name in stub.parts
    assert shipper.waiting() == []


def fail_to_read() -> None:
    raise OSError(errno.EIO, "Input/output error")
