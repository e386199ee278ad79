"""Push, pull, verify and sync: what is said to be there is there, and equal."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import endlex
from endlex.client import checkpoints, transfers
from endlex.client.checkpoints import CheckpointFailed
from endlex.client.shipper.control import BACKGROUND, FOREGROUND, take_lock, unsent
from endlex.client.transfers import pull_checkpoint, push_checkpoint, sync_directory
from endlex.client.transport import Refused, Transport, Unreachable
from endlex.client.verify import compare_directory
from endlex.protocol import EndlexError
from endlex.reading import session_files

RUN = "abcdefgh"
PART = 64 * 1024


@pytest.fixture(autouse=True)
def _small_parts_and_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "PART_BYTES", PART)
    monkeypatch.setattr(transfers, "PATIENCE_SECONDS", 0.5)


def checkpoint(folder: Path, size: int = 5 * PART + 7) -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "model.bin").write_bytes(hashlib.shake_128(b"0").digest(size))
    (folder / "deep" / "meta data.json").write_text("{}")
    (folder / "empty").touch()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def finished_run(directory: Path, source: Path | None = None) -> None:
    with endlex.init("p", "d4", directory=directory, id=RUN) as run:
        run.log({"loss": 1.0})
        if source is not None:
            run.save(source, step=7)


def reasons(directory: Path, transport: Transport) -> list[str]:
    return [str(found) for found in compare_directory(directory, transport).missing]


def test_what_is_pushed_is_pulled(stub: Any, transport: Transport, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source")
    told: list[tuple[int, int]] = []
    push_checkpoint(
        RUN, source, "best", transport, step=3, progress=lambda d, t: told.append((d, t))
    )
    files = pull_checkpoint(RUN, "best", tmp_path / "target", transport)
    assert contents(tmp_path / "target") == contents(source)
    assert {path.name for path in files} == {"model.bin", "meta data.json", "empty"}
    assert told[-1][0] == told[-1][1] > 5 * PART
    received = stub.part_bytes_received
    push_checkpoint(RUN, source, "best", transport, step=3)
    assert stub.part_bytes_received == received
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target"}
    (source / "model.bin").write_bytes(b"other")
    with pytest.raises(CheckpointFailed, match="another checkpoint has this name"):
        push_checkpoint(RUN, source, "best", transport, step=3)


def test_a_pull_that_was_cut_goes_on(
    stub: Any, transport: Transport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path / "source")
    push_checkpoint(RUN, source, "best", transport)
    monkeypatch.setattr(transfers, "CONNECTIONS", 1)
    served = []

    def third_fails(method: str, path: str) -> str | None:
        served.append(path)
        return "cut" if path.endswith("model.bin") and len(served) > 4 else None

    stub.before = third_fails
    target = tmp_path / "target"
    with pytest.raises(Unreachable):
        pull_checkpoint(RUN, "best", target, transport)
    assert not target.exists()
    stub.before = lambda method, path: None
    stub.requests.clear()
    pull_checkpoint(RUN, "best", target, transport)
    assert contents(target) == contents(source)
    assert 0 < sum("/files/" in path for _, path in stub.requests) < 6


def test_damage_on_the_way_is_noticed(stub: Any, transport: Transport, tmp_path: Path) -> None:
    push_checkpoint(RUN, checkpoint(tmp_path / "source"), "best", transport)
    for sha256, part in stub.parts.items():
        stub.parts[sha256] = bytes([part[0] ^ 1]) + part[1:]
    with pytest.raises(EndlexError, match="something else than part"):
        pull_checkpoint(RUN, "best", tmp_path / "target", transport)
    assert not (tmp_path / "target").exists()


def test_a_pull_keeps_equal_files_and_refuses_to_replace_others(
    stub: Any, transport: Transport, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "source")
    push_checkpoint(RUN, source, "best", transport)
    target = tmp_path / "target"
    pull_checkpoint(RUN, "best", target, transport)
    (target / "run.json").write_text("{}")
    stub.requests.clear()
    pull_checkpoint(RUN, "best", target, transport)
    assert not any("/files/" in path for _, path in stub.requests)
    (target / "model.bin").write_bytes(b"mine")
    with pytest.raises(EndlexError, match="is there already and differs"):
        pull_checkpoint(RUN, "best", target, transport)
    assert (target / "model.bin").read_bytes() == b"mine"


def test_a_manifest_that_would_write_elsewhere_is_refused(
    stub: Any, transport: Transport, tmp_path: Path
) -> None:
    push_checkpoint(RUN, checkpoint(tmp_path / "source"), "best", transport)
    stub.manifests[RUN, "best"]["files"][0]["path"] = "../outside"
    with pytest.raises(EndlexError, match="path"):
        pull_checkpoint(RUN, "best", tmp_path / "target", transport)
    with pytest.raises(EndlexError, match="no checkpoint 'unknown'"):
        pull_checkpoint(RUN, "unknown", tmp_path / "target", transport)


def test_verify_says_what_is_missing_until_nothing_is(
    stub: Any, transport: Transport, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    finished_run(directory, checkpoint(tmp_path / "step_7"))
    (session,) = session_files(directory)
    assert reasons(directory, transport) == [
        f"journal {session.stem}: {session.stat().st_size:,} bytes are not sent",
        "checkpoint step_7: not sent yet, or not published",
    ]
    left = unsent(directory)
    assert (left.records, left.files) == (4, 3)
    told: list[tuple[str, int, int]] = []
    sync_directory(directory, transport, lambda *figures: told.append(figures))
    assert reasons(directory, transport) == []
    assert {what for what, _, _ in told} == {"journal", "step_7"}
    assert ("journal", session.stat().st_size, session.stat().st_size) in told
    assert (session.stem, "finished") in stub.states
    sync_directory(directory, transport)


def test_verify_compares_contents_and_not_only_sizes(
    stub: Any, transport: Transport, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    finished_run(directory, checkpoint(tmp_path / "step_7"))
    sync_directory(directory, transport)
    (held,) = stub.journals.values()
    held[-5] ^= 1
    stub.manifests[RUN, "step_7"]["files"][0]["sha256"] = "0" * 64
    found = reasons(directory, transport)
    assert [line.split(":")[0] for line in found] == [
        f"journal {session_files(directory)[0].stem}",
        "checkpoint step_7",
    ]
    assert all("differ" in line for line in found)


def test_verify_misses_a_checkpoint_whose_traces_are_gone(
    stub: Any, transport: Transport, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    finished_run(directory, checkpoint(tmp_path / "step_7"))
    for path in [*(directory / "staged" / "step_7").rglob("*")][::-1]:
        path.unlink() if path.is_file() else path.rmdir()
    (directory / "staged" / "step_7").rmdir()
    sync_directory(directory, transport)
    assert reasons(directory, transport) == [
        f"checkpoint step_7: the server has no checkpoint 'step_7' of run {RUN}"
    ]


def test_verify_says_who_is_alive(stub: Any, transport: Transport, tmp_path: Path) -> None:
    run = endlex.init("p", "d4", directory=tmp_path, id=RUN)
    sync_directory(tmp_path, transport)
    lock = take_lock(tmp_path, BACKGROUND)
    assert lock is not None
    live = [
        found for found in compare_directory(tmp_path, transport).missing if found.kind == "live"
    ]
    assert [found.name for found in live] == [run.session, "shipper"]
    lock.close()
    run.finish()
    assert (run.session, "finished") not in stub.states
    assert [found.kind for found in compare_directory(tmp_path, transport).missing] == ["journal"]


def test_a_server_that_cannot_be_asked_is_no_yes(stub: Any, tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    with pytest.raises(Unreachable):
        compare_directory(tmp_path / "run", Transport("http://127.0.0.1:9"))
    with pytest.raises(Unreachable):
        sync_directory(tmp_path / "run", Transport("http://127.0.0.1:9"))
    stub.token = "t"
    with pytest.raises(Refused):
        compare_directory(tmp_path / "run", Transport(stub.url))
    with pytest.raises(EndlexError, match="401"):
        sync_directory(tmp_path / "run", Transport(stub.url))
    with pytest.raises(EndlexError, match=r"no run\.json"):
        compare_directory(tmp_path, Transport(stub.url))


def test_sync_outlasts_an_outage_and_sends_the_rest_when_one_thing_is_refused(
    stub: Any, transport: Transport, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    finished_run(directory, checkpoint(tmp_path / "step_7"))
    finished_run(directory)
    first, second = session_files(directory)
    faults = iter([503, "cut", 500, None])
    stub.before = lambda method, path: (
        422 if first.stem in path and method == "POST" else next(faults, None)
    )
    with pytest.raises(EndlexError, match="422"):
        sync_directory(directory, transport)
    assert stub.content(second.stem) == second.read_bytes()
    assert list(stub.manifests) == [(RUN, "step_7")]


def test_two_syncs_do_not_meet(transport: Transport, tmp_path: Path) -> None:
    finished_run(tmp_path)
    with take_lock(tmp_path, FOREGROUND) as lock:  # type: ignore[union-attr]
        assert lock is not None
        with pytest.raises(EndlexError, match=r"sends .* already"):
            sync_directory(tmp_path, transport)


def test_sync_takes_over_from_a_shipper_and_leaves_one_behind_for_a_live_trainer(
    stub: Any, transport: Transport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Any
) -> None:
    from endlex.client.shipper.control import shipper_process, stop_shipper

    monkeypatch.setenv("ENDLEX_URL", "http://127.0.0.1:9")
    run = endlex.init("p", "d4", directory=tmp_path, id=RUN)
    until(lambda: shipper_process(tmp_path) is not None)
    wrong = shipper_process(tmp_path)
    sync_directory(tmp_path, transport)
    assert stub.content(run.session).count(b"\n") == 1
    until(lambda: shipper_process(tmp_path) is not None)
    assert shipper_process(tmp_path) != wrong
    run.finish()
    assert stub.content(run.session).count(b"\n") == 2
    stop_shipper(tmp_path)
    state = json.loads((tmp_path / "shipper.json").read_text())
    assert state["url"] == stub.url
