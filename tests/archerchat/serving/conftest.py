"""A home with a base model and a chat model, both of a second's training, and clients of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")
pytest.importorskip("llguidance")
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from archerchat.home import Home
from archerchat.runtime import build_runtime
from archerchat.serving.app import build_app
from archerchat.serving.config import ServeConfig
from archerchat.serving.guard import Connection

Open = Callable[..., TestClient]
URL = "http://127.0.0.1"


@pytest.fixture(scope="session")
def served_home(trained_template: Any, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The base model's weights serve as those of a chat model, which says nothing of sense."""
    home: Home = trained_template.copy(tmp_path_factory.mktemp("served") / "home")
    (home.root / "checkpoints" / "sft").symlink_to(home.root / "checkpoints" / "base")
    return home


@pytest.fixture
def serve(served_home: Home) -> Iterator[Open]:
    """Start an application with these options; return its client."""
    with ExitStack() as stack:

        def start(home: Home = served_home, **options: Any) -> TestClient:
            app = build_app(home, build_runtime("cpu", "float32"), ServeConfig(**options))
            return stack.enter_context(TestClient(app, base_url=URL, raise_server_exceptions=False))

        yield start


@pytest.fixture(scope="module")
def client(served_home: Home) -> Iterator[TestClient]:
    app = build_app(served_home, build_runtime("cpu", "float32"), ServeConfig())
    with TestClient(app, base_url=URL, raise_server_exceptions=False) as found:
        yield found


@contextmanager
def listening(app: FastAPI) -> Iterator[tuple[str, int]]:
    """Run an application on a free port; yield its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=Connection, log_level="warning", timeout_graceful_shutdown=10)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        running.should_exit = True
        thread.join(60)


@pytest.fixture(scope="session")
def listen() -> Callable[[FastAPI], Any]:
    return listening


SIZES = """["navigation", "resource"].flatMap((kind) => performance.getEntriesByType(kind))
    .map((each) => [each.name, each.transferSize])"""


def say_something(route: Any) -> None:
    """Keep the model, which has learnt next to nothing, from ending an answer with its start."""
    body = route.request.post_data_json | {"logit_bias": {"351": -100, "355": -100}}
    route.continue_(post_data=json.dumps(body))


@contextmanager
def running_browser(chromium: Any, limit_seconds: float = 300) -> Iterator[Any]:
    """Run Chromium, and kill it after this time.

    Playwright's `evaluate`, `keyboard.press` and `close` take no timeout: they would wait for ever
    for a page that hangs. They fail when the browser ends.
    """
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on PATH")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    browser = chromium.launch(executable_path=path, args=sandbox)
    found = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    pid = next(each["id"] for each in found if each["type"] == "browser")
    timer = threading.Timer(limit_seconds, os.kill, (pid, signal.SIGKILL))
    timer.start()
    try:
        yield browser
        browser.close()
    finally:
        timer.cancel()


@pytest.fixture(scope="session")
def run_browser() -> Callable[..., Any]:
    return running_browser


def dismiss(page: Any, dialog: Any) -> None:
    """Note a dialog, which no page should open; the page would hang while it is open."""
    page.problems.append(dialog.message)
    dialog.dismiss()


@pytest.fixture(scope="module")
def page(served_home: Home, listen: Any, run_browser: Any) -> Iterator[Any]:
    """The page of a phone's width, open on a server."""
    playwright = pytest.importorskip("playwright.sync_api")
    app = build_app(served_home, build_runtime("cpu", "float32"), ServeConfig())
    with (
        listen(app) as address,
        playwright.sync_playwright() as started,
        run_browser(started.chromium) as browser,
    ):
        found = browser.new_context(viewport={"width": 390, "height": 800}).new_page()
        found.problems = []
        found.on("pageerror", lambda error: found.problems.append(str(error)))
        found.on("dialog", lambda dialog: dismiss(found, dialog))
        found.route("**/completions", say_something)
        found.goto("http://{}:{}/".format(*address))
        found.wait_for_selector("#model option", state="attached")
        found.first_paint = dict(found.evaluate(SIZES))
        yield found
