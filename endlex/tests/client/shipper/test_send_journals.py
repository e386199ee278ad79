"""Whatever happens to a batch on its way, the server's copy becomes the journal, byte for byte."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from endlex.client.journal import Journal
from endlex.client.shipper import send_journals
from endlex.client.shipper.send_journals import SessionShipper, read_batch
from endlex.client.transport import Retry, Transport
from endlex.protocol import MAX_BATCH_BYTES, METRICS, EndlexError

RUN = "abcdefgh"


def journal(directory: Path, records: int = 20) -> Path:
    opened = Journal(directory, {"kind": "trainer"})
    for step in range(records):
        opened.append(METRICS, {"step": step, "values": {"loss": step / 7}})
    opened.close()
    return opened.path


def ship_all(sync: SessionShipper) -> int:
    faults = 0
    while True:
        try:
            if not sync.ship():
                return faults
        except Retry:
            faults += 1


def test_a_journal_arrives_whole(stub: Any, transport: Transport, tmp_path: Path) -> None:
    path = journal(tmp_path)
    sync = SessionShipper(RUN, path, transport)
    assert sync.missing_bytes() == path.stat().st_size
    assert ship_all(sync) == 0
    assert stub.content(path.stem) == path.read_bytes()
    assert sync.missing_bytes() == 0
    posts = [r for r in stub.requests if r[0] == "POST"]
    assert len(posts) == 1


def test_another_shipper_goes_on_from_what_is_there(
    stub: Any, transport: Transport, tmp_path: Path
) -> None:
    path = journal(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\n") + 1])
    ship_all(SessionShipper(RUN, path, transport))
    path.write_bytes(whole)
    sync = SessionShipper(RUN, path, transport)
    assert sync.ask() == whole.index(b"\n") + 1
    assert sync.ship() == len(whole) - whole.index(b"\n") - 1
    assert stub.content(path.stem) == whole


def test_the_last_record_torn_at_any_byte_is_sent_when_it_is_whole(
    stub: Any, transport: Transport, tmp_path: Path
) -> None:
    path = journal(tmp_path, 3)
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    sync = SessionShipper(RUN, path, transport)
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        ship_all(sync)
        assert stub.content(path.stem) == whole[:last]
        assert sync.missing_bytes() == 0
    path.write_bytes(whole)
    ship_all(sync)
    assert stub.content(path.stem) == whole


@pytest.mark.parametrize("fault", ["cut", 500, 503, 507, 400])
@pytest.mark.parametrize("when", ["before", "after"])
def test_faults_before_and_after_the_effect(
    stub: Any,
    transport: Transport,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: int | str,
    when: str,
) -> None:
    monkeypatch.setattr(send_journals, "BATCH_BYTES", 200)
    path, rng = journal(tmp_path, 40), random.Random(0)
    setattr(
        stub,
        when,
        lambda method, path: fault if method == "POST" and rng.random() < 0.4 else None,
    )
    assert ship_all(SessionShipper(RUN, path, transport)) > 0
    assert stub.content(path.stem) == path.read_bytes()


def test_a_server_that_forgot_gets_it_again(
    stub: Any, transport: Transport, tmp_path: Path
) -> None:
    path = journal(tmp_path)
    sync = SessionShipper(RUN, path, transport)
    ship_all(sync)
    stub.journals.clear()
    with path.open("ab") as file:
        file.write(b'{"type":"metrics"}\n')
    assert ship_all(sync) == 1
    assert stub.content(path.stem) == path.read_bytes()


def test_what_this_side_lost_after_it_was_sent_is_not_missing_but_a_difference_is(
    stub: Any, transport: Transport, tmp_path: Path
) -> None:
    path = journal(tmp_path)
    whole = path.read_bytes()
    ship_all(SessionShipper(RUN, path, transport))
    path.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 1])
    sync = SessionShipper(RUN, path, transport)
    assert sync.missing_bytes() == 0
    assert sync.ship() == 0
    path.write_bytes(whole.replace(b'"step":1,', b'"step":2,'))
    with pytest.raises(EndlexError, match="differs from"):
        sync.missing_bytes()


def test_what_is_not_on_this_machine_is_compressed(
    stub: Any, transport: Transport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = journal(tmp_path)
    monkeypatch.setattr(Transport, "is_local", False)
    ship_all(SessionShipper(RUN, path, transport))
    assert stub.content(path.stem) == path.read_bytes()
    assert stub.encodings == {"deflate"}


def test_batches_are_whole_lines_however_long(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b"a" * 10 + b"\n" + b"b" * 300 + b"\n" + b"c" * 5)
    assert read_batch(path, 0, 100) == b"a" * 10 + b"\n"
    assert read_batch(path, 11, 100) == b"b" * 300 + b"\n"
    assert read_batch(path, 312, 100) == b""
    path.write_bytes(b"x" * (MAX_BATCH_BYTES + 1))
    with pytest.raises(EndlexError, match="a line of more than"):
        read_batch(path, 0, 100)


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"offset": "x"}', b"<html>"])
def test_a_server_that_is_none_is_tried_again(
    stub: Any, transport: Transport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr(stub, "_http", stub._http)
    handler = stub._http.RequestHandlerClass
    monkeypatch.setattr(handler, "_route", lambda *arguments: (200, answer))
    with pytest.raises(Retry, match="does not answer like an Endlex server"):
        SessionShipper(RUN, journal(tmp_path), transport).ship()
