"""One session's trouble is its own; a server's trouble is everyone's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from endlex.client.journal import Journal
from endlex.client.shipper import send_journals
from endlex.client.shipper.send_journals import JournalShipper
from endlex.client.transport import Retry, Transport, Unreachable
from endlex.protocol import METRICS

RUN = "abcdefgh"


def journal(directory: Path, kind: str = "trainer") -> Journal:
    opened = Journal(directory, {"kind": kind})
    opened.append(METRICS, {"step": 0, "values": {"loss": 1.0}})
    return opened


def settle(shipper: JournalShipper) -> None:
    for _ in range(3):
        shipper.tick()


@pytest.mark.parametrize("fault", [500, 503, 422, 413, 404])
def test_a_fault_of_one_session_leaves_the_others_to_go_on(
    stub: Any, transport: Transport, tmp_path: Path, fault: int
) -> None:
    first, second = journal(tmp_path), journal(tmp_path)
    stub.before = lambda method, path: fault if first.session in path and method == "POST" else None
    shipper = JournalShipper(tmp_path, RUN, transport)
    if fault >= 500:
        with pytest.raises(Retry, match=str(fault)):
            shipper.tick()
    else:
        shipper.tick()
        assert str(fault) in str(shipper.sessions[first.session].error)
    assert stub.content(second.session) == second.path.read_bytes()
    first.close()
    second.close()


def test_what_was_refused_waits_and_works_later(
    stub: Any, transport: Transport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = journal(tmp_path)
    stub.before = lambda method, path: 403
    monkeypatch.setattr(send_journals, "REFUSED_SECONDS", 0.0)
    shipper = JournalShipper(tmp_path, RUN, transport)
    shipper.tick()
    assert shipper.denied
    stub.before = lambda method, path: None
    settle(shipper)
    assert stub.content(opened.session) == opened.path.read_bytes()
    assert shipper.sessions[opened.session].error is None
    monkeypatch.setattr(send_journals, "REFUSED_SECONDS", 30.0)
    patient = JournalShipper(tmp_path, RUN, transport)
    stub.before = lambda method, path: 403
    patient.tick()
    asked = len(stub.requests)
    patient.tick()
    assert len(stub.requests) == asked
    opened.close()


def test_a_server_that_is_gone_is_said(stub: Any, transport: Transport, tmp_path: Path) -> None:
    journal(tmp_path).close()
    stub.stop()
    with pytest.raises(Unreachable):
        JournalShipper(tmp_path, RUN, transport).tick()
    stub.restart()


def test_the_server_hears_of_life_and_of_the_end_once(
    stub: Any, transport: Transport, tmp_path: Path
) -> None:
    opened, system = journal(tmp_path), journal(tmp_path, "system")
    shipper = JournalShipper(tmp_path, RUN, transport)
    settle(shipper)
    assert stub.states == [(opened.session, "running"), (system.session, "running")]
    assert shipper.has_live_trainer()
    opened.close()
    system.close()
    settle(shipper)
    assert not shipper.has_live_trainer()
    assert stub.states[2:] == [(opened.session, "crashed"), (system.session, "interrupted")]
    assert all(session.done for session in shipper.sessions.values())
    told = list(stub.states)
    settle(JournalShipper(tmp_path, RUN, transport, reported=list(shipper.sessions)))
    assert stub.states == told
    stub.journals.clear()  # another server, which heard nothing
    settle(JournalShipper(tmp_path, RUN, transport, reported=list(shipper.sessions)))
    assert len(stub.states) > len(told)


def test_a_heartbeat_says_what_is_unsent(
    stub: Any, transport: Transport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = journal(tmp_path)
    monkeypatch.setattr(send_journals, "HEARTBEAT_SECONDS", 0.0)
    shipper = JournalShipper(tmp_path, RUN, transport)
    settle(shipper)
    assert len(stub.states) == 3
    opened.close()


def test_new_sessions_are_found(stub: Any, transport: Transport, tmp_path: Path) -> None:
    journal(tmp_path).close()
    shipper = JournalShipper(tmp_path, RUN, transport)
    settle(shipper)
    assert shipper.all_done()
    second = journal(tmp_path)
    assert not shipper.all_done()
    settle(shipper)
    assert stub.content(second.session) == second.path.read_bytes()
    second.close()


def test_a_torn_tail_is_neither_sent_nor_waited_for(
    stub: Any, transport: Transport, tmp_path: Path
) -> None:
    opened = journal(tmp_path)
    opened.close()
    whole = opened.path.read_bytes()
    with opened.path.open("ab") as file:
        file.write(b'{"type":"metr')
    shipper = JournalShipper(tmp_path, RUN, transport)
    settle(shipper)
    assert stub.content(opened.session) == whole
    assert shipper.sessions[opened.session].done
    assert stub.states[-1] == (opened.session, "crashed")
