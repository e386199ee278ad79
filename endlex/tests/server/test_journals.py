"""Journals come in once, whole and in order, whatever the sender does."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from typing import Any

import pytest

RUN = "testrun001"
SESSION = "000001-abcdef012345"
STATE = f"/api/v1/runs/{RUN}/sessions/{SESSION}/state"


def held(box: Any) -> bytes:
    return bytes(box.client.get(box.url + "/raw").content)


def test_what_was_sent_is_here_byte_for_byte_and_by_its_hash(box: Any) -> None:
    box.begin()
    for step in range(0, 3000, 500):
        box.send([box.metrics(s, {"train/loss": 1 / (s + 1)}) for s in range(step, step + 500)])
    assert held(box) == box.sent
    for upto in (len(box.sent), 1, 100_000, 2 * len(box.sent)):
        known = box.client.get(box.url, params={"upto": upto}).json()
        expected = hashlib.sha256(box.sent[:upto]).hexdigest()
        assert known == {"offset": len(box.sent), "sha256": expected}


def test_bytes_that_are_here_are_skipped_so_nothing_is_there_twice(box: Any) -> None:
    box.begin()
    first = box.lines([box.metrics(0, {"loss": 2.0})])
    second = box.lines([box.metrics(1, {"loss": 1.0})])
    start = len(box.sent)
    assert box.post(first, start).json() == {"offset": start + len(first)}
    assert box.post(first, start).json() == {"offset": start + len(first)}
    reached = start + len(first + second)
    assert box.post(first + second, start).json() == {"offset": reached}
    assert held(box) == box.sent + first + second
    series = box.client.get(f"/api/v1/runs/{RUN}/series", params={"metric": "loss"}).json()
    assert series["series"]["loss"]["y"] == [2.0, 1.0]
    metric = box.client.get(f"/api/v1/runs/{RUN}").json()["metrics"][0]
    assert metric["count"] == 2


def test_a_gap_is_refused_with_the_offset_to_go_on_from(box: Any) -> None:
    box.begin()
    answer = box.post(box.lines([box.metrics(9, {"loss": 1.0})]), len(box.sent) + 7)
    assert answer.status_code == 409
    assert answer.json()["offset"] == len(box.sent)
    assert held(box) == box.sent


def test_an_unknown_session_is_at_offset_zero(box: Any) -> None:
    assert box.client.get(box.url).status_code == 404
    answer = box.post(box.lines([box.metrics(0, {"loss": 1.0})]), 500)
    assert (answer.status_code, answer.json()["offset"]) == (409, 0)


def test_a_journal_that_was_changed_behind_the_server_is_refused(box: Any) -> None:
    box.begin()
    altered = b"{}" + box.sent + box.lines([box.metrics(0, {"loss": 1.0})])
    answer = box.post(altered, 0)
    assert answer.status_code == 422
    assert "changed" in answer.json()["error"]
    assert held(box) == box.sent


def test_a_wrong_crc_and_a_torn_line_are_refused(box: Any) -> None:
    box.begin()
    body = box.lines([box.metrics(0, {"loss": 1.0})])
    query = {"offset": str(len(box.sent)), "crc": f"{zlib.crc32(body) ^ 1:08x}"}
    assert box.client.post(box.url, params=query, content=body).status_code == 400
    assert box.post(body[:-1], len(box.sent)).status_code == 400
    assert held(box) == box.sent


def test_compressed_batches_are_the_same_batches(box: Any) -> None:
    box.begin()
    body = box.lines([box.metrics(step, {"loss": 1.0}) for step in range(100)])
    query = {"offset": str(len(box.sent)), "crc": f"{zlib.crc32(body):08x}"}
    headers = {"Content-Encoding": "deflate"}
    packed = zlib.compress(body)
    cut = box.client.post(box.url, params=query, content=packed[:-9], headers=headers)
    assert cut.status_code == 400
    assert box.client.post(box.url, params=query, content=packed, headers=headers).json() == {
        "offset": len(box.sent) + len(body)
    }
    assert held(box) == box.sent + body
    other = box.client.post(box.url, params=query, content=b"x", headers={"Content-Encoding": "br"})
    assert other.status_code == 415


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"type": "metrics"}, "first line"),
        ({"protocol": 1}, "protocol"),
        ({"run": "otherrun99"}, "run"),
        ({"session": "other"}, "session"),
        ({"project": ""}, "project"),
        ({"kind": "robot"}, "kind"),
        ({"time": "now"}, "time"),
    ],
)
def test_a_session_begins_with_its_own_record(
    box: Any, changes: dict[str, object], word: str
) -> None:
    answer = box.post(box.lines([{**box.session_record(), **changes}]), 0)
    assert answer.status_code == 422
    assert word in answer.json()["error"]
    assert box.client.get("/api/v1/runs").json()["total"] == 0


def test_a_run_arrives_whatever_its_optional_fields_hold(box: Any) -> None:
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = {"deeper": deep}
    odd = {"group": 5, "notes": ["a"], "tags": ["fast", 7], "host": {"a": 1}, "pid": 2**70}
    box.begin(**odd, rank="first", config={"seed": 2**70})
    box.send([{"type": "config", "time": 1.0, "config": {"seed": 2**71, "deep": deep}}])
    (found,) = box.client.get("/api/v1/runs").json()["runs"]
    assert (found["group"], found["notes"], found["host"]) == ("5", "['a']", "{'a': 1}")
    assert found["tags"] == ["fast", "7"]
    assert found["config"] == {"seed": float(2**70)}
    (session,) = box.client.get(f"/api/v1/runs/{box.run}").json()["sessions"]
    assert (session["rank"], session["damaged_lines"]) == (0, 1)


def test_a_first_record_with_a_configuration_of_many_levels_is_taken(box: Any) -> None:
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = {"deeper": deep}
    box.begin(config={"deep": deep}, notes="x" * 20_000)
    (found,) = box.client.get("/api/v1/runs").json()["runs"]
    assert found["config"]["config"].startswith("{'deep': {'deeper': {")
    assert found["notes"] == "x" * 10_000


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (["lr", 0.1], "['lr', 0.1]"),
        ("lr=0.1", "lr=0.1"),
        (5, "5"),
        (False, "False"),
    ],
)
def test_a_configuration_of_any_kind_is_kept_as_text(box: Any, config: Any, kept: str) -> None:
    box.begin(config=config)
    (found,) = box.client.get("/api/v1/runs").json()["runs"]
    assert found["config"] == {"config": kept}


def test_fields_too_deep_to_be_printed_leave_a_fixed_text(box: Any) -> None:
    """As deep as the parser takes: deeper than `str` may recurse, before Python 3.12."""
    line = box.lines([box.session_record(config="DEEP", notes="DEEP", tags=["DEEP", "fast"])])
    deep = b'{"a":' * 1020 + b"0" + b"}" * 1020
    assert box.post(line.replace(b'"DEEP"', deep), 0).status_code == 200
    (listed,) = box.client.get("/api/v1/runs").json()["runs"]
    found = box.client.get(f"/api/v1/runs/{listed['run']}").json()
    said = found["notes"]
    assert said == "(nested too deeply to be shown)" or said.startswith("{'a': {'a'")
    assert found["config"] == {"config": said}
    assert found["tags"] == [said, "fast"]


def test_damaged_lines_are_kept_and_counted_and_block_nothing(box: Any) -> None:
    box.begin()
    damaged = [
        b"\n",
        b"{torn\n",
        b"[]\n",
        b'{"type":"metrics","time":1,"step":-1,"values":{"loss":1}}\n',
        b'{"type":"metrics","time":1,"step":1.5,"values":{"loss":1}}\n',
        b'{"type":"metrics","time":1,"step":99999999999999999999,"values":{"loss":1}}\n',
        b'{"type":"metrics","time":1,"step":1,"values":{"loss":"seven"}}\n',
        b'{"type":"metrics","time":1,"step":1,"values":{"loss":null}}\n',
        b'{"type":"metrics","time":1,"step":1,"values":{"lo\\nss":1}}\n',
        b'{"type":"metrics","time":null,"step":1,"values":{"loss":1}}\n',
        b'{"type":"text","time":1,"step":1,"name":"sample"}\n',
        b'{"type":"table","time":1,"step":1,"name":"t","columns":["a"],"rows":[1]}\n',
        b'{"type":"finish","time":1,"status":"exploded"}\n',
        b"\xff\xfe\n",
    ]
    good = box.lines([box.metrics(0, {"loss": 2.0}), {"type": "from the future", "time": 1}])
    body = b"".join(damaged) + good
    answer = box.post(body, len(box.sent))
    assert answer.status_code == 200, answer.text
    assert held(box) == box.sent + body
    session = box.client.get(f"/api/v1/runs/{RUN}/sessions").json()[0]
    assert session["damaged_lines"] == len(damaged)
    found = box.client.get(f"/api/v1/runs/{RUN}/series", params={"metric": "loss"}).json()
    assert found["series"]["loss"]["y"] == [2.0]


def test_sessions_say_how_they_stand(box: Any) -> None:
    client = box.client
    box.begin()
    assert client.post(STATE, json={"status": "running", "unsent_bytes": 12}).status_code == 200
    session = client.get(f"/api/v1/runs/{RUN}/sessions").json()[0]
    assert (session["status"], session["unsent_bytes"]) == ("running", 12)
    client.post(STATE, json={"status": "crashed"})
    assert client.get(f"/api/v1/runs/{RUN}").json()["status"] == "crashed"
    box.send([box.metrics(0, {"loss": 1.0})])  # it was alive after all
    assert client.get(f"/api/v1/runs/{RUN}").json()["status"] == "running"
    box.send([{"type": "finish", "time": 1.0, "status": "finished"}])
    client.post(STATE, json={"status": "running"})
    client.post(STATE, json={"status": "crashed"})
    assert client.get(f"/api/v1/runs/{RUN}").json()["status"] == "finished"
    assert client.post(STATE, json={"status": "asleep"}).status_code == 422
    assert client.post(STATE, json={"status": "running", "unsent_bytes": -1}).status_code == 422
    assert (
        client.post(STATE.replace(SESSION, "unknown"), json={"status": "running"}).status_code
        == 404
    )


def test_a_restarted_server_goes_on_where_it_was(
    start: Callable[..., Any], make_box: Callable[..., Any]
) -> None:
    box = make_box(start())
    box.begin()
    box.send([box.metrics(0, {"loss": 1.0})])
    box.client.__exit__(None, None, None)
    box.client = start()
    box.send([box.metrics(1, {"loss": 0.5})])
    assert held(box) == box.sent


def test_a_full_disk_is_507_and_leaves_nothing_torn(
    start: Callable[..., Any], make_box: Callable[..., Any]
) -> None:
    box = make_box(start(min_free_bytes=2**62))
    answer = box.post(box.lines([box.session_record()]), 0)
    assert answer.status_code == 507
    assert "Retry-After" in answer.headers
    assert box.client.get(box.url).status_code == 404
