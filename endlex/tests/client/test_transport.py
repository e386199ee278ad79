"""Faults come in three kinds, waits are bounded, and no message holds the token."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

from endlex.client.transport import Gap, Refused, Retry, Transport, Unreachable, quoted
from endlex.protocol import EndlexError

TOKEN = "endlex_secret-0123"
PATH = "/runs/abcdefgh/sessions/s/journal"


@pytest.mark.parametrize("status", [500, 502, 503, 507, 429, 408])
def test_what_may_work_later_is_to_be_tried_again(
    stub: Any, transport: Transport, status: int
) -> None:
    stub.before = lambda method, path: status
    with pytest.raises(Retry, match=f"answered GET .* with {status}: fault {status}"):
        transport.request("GET", PATH, query={"upto": 0})


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_is_refused_says_why(stub: Any, transport: Transport, status: int) -> None:
    stub.before = lambda method, path: status
    with pytest.raises(Refused, match=f"fault {status}") as caught:
        transport.request("GET", PATH)
    assert caught.value.status == status
    assert not isinstance(caught.value, Gap)


def test_a_gap_has_its_offset(stub: Any, transport: Transport) -> None:
    query = {"offset": 7, "crc": "00000000"}
    with pytest.raises(Gap) as caught:
        transport.request("PUT", quoted("parts", "a" * 64), query=query, body=b"x")
    assert caught.value.offset == 0


def test_one_connection_serves_many_requests_and_survives_its_idle_end(
    stub: Any, transport: Transport
) -> None:
    accepted = []
    accept = stub._http.get_request
    stub._http.get_request = lambda: accepted.append(1) or accept()
    for _ in range(5):
        transport.request("POST", "/parts/missing", json_body={"parts": []})
    assert len(accepted) == 1
    assert transport._connection is not None
    transport._connection.sock.shutdown(socket.SHUT_RDWR)  # as a server closes idle ones
    transport.request("POST", "/parts/missing", json_body={"parts": []})
    assert len(accepted) == 2


def test_a_cut_answer_is_not_taken_for_a_whole_one() -> None:
    def serve(listening: socket.socket) -> None:
        with listening.accept()[0] as client:
            client.recv(65536)
            client.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"offset": 1}')

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        transport = Transport(f"http://127.0.0.1:{listening.getsockname()[1]}")
        with pytest.raises(Unreachable, match="IncompleteRead"):
            transport.request("GET", PATH)
        thread.join()


def test_why_a_body_is_refused_is_read_before_it_is_all_sent() -> None:
    def serve(listening: socket.socket) -> None:
        with listening.accept()[0] as client:
            client.recv(65536)
            client.sendall(b'HTTP/1.1 413 X\r\nContent-Length: 17\r\n\r\n{"error": "large"}'[:-1])
            client.shutdown(socket.SHUT_WR)
            while client.recv(1 << 20):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        transport = Transport(f"http://127.0.0.1:{listening.getsockname()[1]}")
        with pytest.raises(Refused, match="413"):
            transport.request("PUT", PATH, body=bytes(30 << 20))
        transport.close()
        thread.join()


def test_nobody_there_and_nobody_answering(black_hole: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(Unreachable, match=r"cannot reach .*refused"):
        Transport(f"http://127.0.0.1:{port}").request("GET", PATH)
    began = time.monotonic()
    with pytest.raises(Unreachable, match="no answer in time"):
        Transport(black_hole, read_seconds=0.2).request("GET", PATH)
    assert time.monotonic() - began < 2


def test_the_token_is_sent_and_never_shown(stub: Any) -> None:
    stub.token = TOKEN
    transport = Transport(stub.url, TOKEN)
    transport.request("POST", "/parts/missing", json_body={"parts": []})
    assert TOKEN not in repr(transport)
    stub.token = "another"
    with pytest.raises(Refused, match="401") as caught:
        transport.request("POST", "/parts/missing", json_body={"parts": []})
    assert TOKEN not in str(caught.value)
    transport.renew_token("another")
    transport.request("POST", "/parts/missing", json_body={"parts": []})
    for bad in (TOKEN + "\r\nX: y", TOKEN + "é", TOKEN + " b", ""):
        with pytest.raises(EndlexError) as refused:
            Transport(stub.url, bad)
        assert TOKEN not in str(refused.value)


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://user:pw@host", "http://h:99999"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(EndlexError) as refused:
        Transport(url)
    assert "pw" not in str(refused.value)


def test_urls() -> None:
    transport = Transport("https://example.org/telemetry/")
    assert (transport.url, transport.port) == ("https://example.org/telemetry", 443)
    assert not transport.is_local
    assert Transport("localhost:7777").is_local
    assert quoted("runs", "a b/../c") == "/runs/a%20b%2F..%2Fc"


def test_a_redirect_is_named_and_not_followed(stub: Any, transport: Transport) -> None:
    stub.before = lambda method, path: 302
    with pytest.raises(Refused, match="set ENDLEX_URL to that"):
        transport.request("GET", PATH)
    assert len(stub.requests) == 1
