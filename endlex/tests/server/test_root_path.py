"""Under a path behind a proxy, and with a certificate of one's own."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from endlex.protocol import EndlexError
from endlex.server.api.auth import COOKIE, create_token
from endlex.server.settings import Settings


@pytest.mark.parametrize("before", ["", "/endlex"])
def test_a_proxy_may_cut_the_path_off_or_not(start: Callable[..., Any], before: str) -> None:
    client = start(root_path="/endlex")
    page = client.get(f"{before}/")
    assert 'data-root="/endlex"' in page.text
    assert 'src="/endlex/static/js/runs_page.js"' in page.text
    for path in ("/static/js/runs_page.js", "/runs/testrun001", "/api/v1/runs", "/health"):
        assert client.get(before + path).status_code == 200, path
    assert client.get("/endlexer/health").status_code == 404


def test_logins_stay_under_the_path(start: Callable[..., Any], data_dir: Path) -> None:
    token = create_token(data_dir, "me", ["read"])
    client = start(public=True, root_path="/a/b")
    answer = client.post("/a/b/api/v1/login", data={"token": token})
    assert f"{COOKIE}=" in answer.headers["set-cookie"]
    assert "Path=/a/b;" in answer.headers["set-cookie"]


@pytest.mark.parametrize("wrong", ["endlex", "/endlex/", "/", '/"><script>', "/a//b"])
def test_a_path_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(EndlexError, match="root path"):
        Settings(root_path=wrong)


def test_a_certificate_and_its_key_come_together(tmp_path: Path) -> None:
    with pytest.raises(EndlexError, match="--tls-key"):
        Settings(tls_cert=tmp_path / "c.pem")
    with pytest.raises(EndlexError, match="there is no file"):
        Settings(tls_cert=tmp_path / "c.pem", tls_key=tmp_path / "k.pem")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")
def test_https_is_served_with_a_certificate(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(cert)]
    subprocess.run([*make, *names, *files], check=True, capture_output=True)
    code = (
        "import sys; from pathlib import Path; from endlex.server.app import serve; "
        "from endlex.server.settings import Settings; paths = list(map(Path, sys.argv[1:]))\n"
        "serve(paths[0], Settings(port=0, tls_cert=paths[1], tls_key=paths[2]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data")]
    with subprocess.Popen(
        [*command, str(cert), str(key)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            assert url.startswith("https://")
            context = ssl.create_default_context(cafile=cert)
            with urllib.request.urlopen(f"{url}/health", context=context, timeout=30) as answer:
                assert answer.status == 200
        finally:
            process.terminate()
