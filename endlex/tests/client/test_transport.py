"""Faults come in three kinds, waits are bounded, and no message holds the token."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from endlex.client.transport import Refused, Retry, Transport, Unreachable, proxy_for, quoted
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


def test_a_gap_has_its_offset(stub: Any, transport: Transport) -> None:
    query = {"offset": 7, "crc": "00000000"}
    with pytest.raises(Refused) as caught:
        transport.request("PUT", quoted("parts", "a" * 64), query=query, body=b"x")
    assert caught.value.content["offset"] == 0


def test_one_connection_serves_many_requests_and_survives_its_idle_end(
    stub: Any, transport: Transport
) -> None:
    accepted = []
    accept = stub._http.get_request
    stub._http.get_request = lambda: accepted.append(1) or accept()
    for _ in range(5):
        transport.request("POST", "/parts/missing", json_body={"parts": []})
    assert len(accepted) == 1
    assert transport._local.connection is not None
    transport._local.connection.sock.shutdown(socket.SHUT_RDWR)  # as a server closes idle ones
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


def test_nobody_there_and_nobody_answering(
    black_hole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(Unreachable, match=r"cannot reach .*refused"):
        Transport(f"http://127.0.0.1:{port}").request("GET", PATH)
    monkeypatch.setattr("endlex.client.transport.READ_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(Unreachable, match="no answer in time"):
        Transport(black_hole).request("GET", PATH)
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


class Proxy(threading.Thread):
    """Answers every connection with what it is told, and keeps what was asked."""

    def __init__(self, answer: bytes) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.answer, self.asked = answer, b""
        self.start()

    def run(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            self.asked += connection.recv(4096)
            connection.sendall(self.answer)
            connection.close()


def test_a_proxy_of_the_environment_is_used_but_not_for_this_machine(
    stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b'{"status": "ok"}'
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    plain, tunnel = Proxy(answer), Proxy(b"HTTP/1.1 407 No\r\n\r\n")
    monkeypatch.setenv("http_proxy", f"http://me:p%40ss@{plain.address}")
    monkeypatch.setenv("https_proxy", f"http://{tunnel.address}")
    assert Transport("http://endlex.example").request("GET", "/health").content == {"status": "ok"}
    assert plain.asked.startswith(b"GET http://endlex.example:80/health HTTP/1.1")
    assert b"Proxy-Authorization: Basic bWU6cEBzcw==" in plain.asked
    with pytest.raises(Unreachable, match=r"407 No \(that is the proxy's answer: see HTTPS_PROXY"):
        Transport("https://endlex.example").request("GET", "/health")
    assert tunnel.asked.startswith(b"CONNECT endlex.example:443")
    Transport(stub.url).request("POST", "/parts/missing", json_body={"parts": []})
    monkeypatch.setenv("no_proxy", "endlex.example")
    assert proxy_for("https://endlex.example") is None


def test_a_certificate_of_ones_own_is_called_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    words = [*command.split(), "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    try:
        subprocess.run(
            [*words, "-keyout", key, "-out", certificate], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no openssl here to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"https://localhost:{server.server_address[1]}"
    with pytest.raises(Unreachable, match=r"certificate is self-signed.*SSL_CERT_FILE"):
        Transport(url).request("GET", "/health")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert Transport(url).request("GET", "/health").content == {}
    server.shutdown()
