"""A real server on a free port, journals sent to it, and headless Chromium to look at it with."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from endlex.protocol import PROTOCOL
from endlex.server.app import build_app
from endlex.server.settings import Settings

playwright_api = pytest.importorskip("playwright.sync_api")
playwright_api.expect.set_options(timeout=30_000)

SESSION = "000001-abcdef012345"
BEGAN = 1_700_000_000.0


class LiveServer:
    """A server in a thread, and the training side that sends to it."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        config = uvicorn.Config(
            build_app(directory, settings), port=0, log_level="error", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 120
        while not self._server.started:
            assert time.monotonic() < deadline, "the server did not start within 120 s"
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=f"{self.url}/api/v1", timeout=30)
        self._offsets: dict[str, int] = {}

    def stop(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(20)

    def send(self, run: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Append records to the run's one session."""
        offset = self._offsets.get(run, 0)
        body = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        answer = self.client.post(
            f"/runs/{run}/sessions/{SESSION}/journal",
            params={"offset": offset, "crc": f"{zlib.crc32(body):08x}"},
            content=body,
        )
        assert answer.status_code == 200, answer.text
        self._offsets[run] = answer.json()["offset"]

    def begin(self, run: str, name: str, **changes: Any) -> None:
        """Send a run's first record."""
        record = {"type": "session", "session": SESSION, "seq": 0, "time": BEGAN, "run": run}
        record |= {"protocol": PROTOCOL, "project": "tests", "name": name, "config": {}}
        record |= {"tags": [], "group": None, "notes": "", "host": "box", "pid": 1, "rank": 0}
        self.send(run, [{**record, "kind": "trainer", **changes}])

    def log(self, run: str, values: Mapping[str, Mapping[int, float | str]]) -> None:
        """Send metrics: {name: {step: value}}; each step takes a second."""
        steps = sorted({step for points in values.values() for step in points})
        self.send(
            run,
            [
                {
                    "type": "metrics",
                    "session": SESSION,
                    "seq": step + 1,
                    "time": BEGAN + step,
                    "step": step,
                    "values": {name: p[step] for name, p in values.items() if step in p},
                }
                for step in steps
            ],
        )

    def record(self, run: str, kind: str, **content: Any) -> None:
        """Send one record of another type."""
        self.send(run, [{"type": kind, "session": SESSION, "seq": 0, "time": BEGAN, **content}])


@pytest.fixture
def contexts() -> list[Any]:
    """The browser's open windows. They are closed before the server stops: it waits for readers."""
    return []


def close_all(contexts: list[Any]) -> None:
    while contexts:
        contexts.pop().close()


@pytest.fixture
def server(make_server: Callable[[Settings], LiveServer]) -> LiveServer:
    return make_server(Settings())


@pytest.fixture
def make_server(tmp_path: Path, contexts: list[Any]) -> Iterator[Callable[[Settings], LiveServer]]:
    """Start a server with settings of one's own, on `tmp_path / "data"`."""
    started: list[LiveServer] = []

    def make(settings: Settings) -> LiveServer:
        started.append(LiveServer(tmp_path / "data", settings))
        return started[-1]

    yield make
    close_all(contexts)
    for live in started:
        live.stop()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on PATH")
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=sandbox)
        yield browser
        browser.close()


class Problems(list[str]):
    """What the browser complained about; a test that expects something takes it out."""


@pytest.fixture
def new_page(chromium: Any, contexts: list[Any]) -> Iterator[Callable[..., Any]]:
    """Open pages that fail the test on script errors and on broken content security policy."""
    problems = Problems()

    def make(**options: Any) -> Any:
        options = {"viewport": {"width": 1280, "height": 900}, **options}
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: _note(problems, message))
        page.on("dialog", lambda dialog: (problems.append("a dialog opened"), dialog.dismiss()))
        page.problems = problems
        return page

    yield make
    close_all(contexts)
    assert not problems


def _note(problems: Problems, message: Any) -> None:
    # A failed request is logged too, without saying which; tests of errors look at the page.
    if message.type == "error" and "Failed to load resource" not in message.text:
        problems.append(message.text)


@pytest.fixture
def page(new_page: Callable[..., Any]) -> Any:
    return new_page()


@pytest.fixture
def wait_for_chart() -> Callable[..., dict[str, Any]]:
    """Wait until a metric's chart holds data (and a condition in JavaScript is true of it)."""

    def wait(page: Any, metric: str, condition: str = "true") -> dict[str, Any]:
        loaded = "chart.built && chart.lines.some((line) => line.x.length)"
        find = f"window.endlexCharts?.find((chart) => chart.metric === {json.dumps(metric)})"
        page.wait_for_function(
            f"() => {{ const chart = {find}; return chart && {loaded} && ({condition}); }}"
        )
        snapshot: dict[str, Any] = page.evaluate(f"() => {find}")
        return snapshot

    return wait
