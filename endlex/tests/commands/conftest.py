"""A real server in a thread of the test process, and what the commands see of the machine."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn

import endlex
from endlex.cli import main
from endlex.server.app import build_app
from endlex.server.settings import Settings

Cli = Callable[..., tuple[int, str, str]]


@contextmanager
def serving(data: Path, settings: Settings) -> Iterator[str]:
    """Run a server in a thread, on a free port; yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(build_app(data, settings), log_level="error", access_log=False)
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not runner.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    runner.should_exit = True
    thread.join(30)
    listener.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with no token."""
    with serving(tmp_path_factory.mktemp("data"), Settings(min_free_bytes=0)) as url:
        yield url


@pytest.fixture(scope="session")
def closed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a server that asks everyone for a token, and its data directory."""
    data = tmp_path_factory.mktemp("closed")
    with serving(data, Settings(min_free_bytes=0, public=True)) as url:
        yield url, data


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to work in, with nothing of the user's."""
    for name in ("URL", "TOKEN", "DIR", "RUN_ID", "MODE", "HOME"):
        monkeypatch.delenv(f"ENDLEX_{name}", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ENDLEX_ENVIRONMENT", "0")
    monkeypatch.setenv("ENDLEX_CONSOLE", "0")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line; returns its exit status, and what it printed."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:  # of the parser
            status = int(stop.code or 0)
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def online(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's address, set in the environment."""
    monkeypatch.setenv("ENDLEX_URL", server)
    return server


Train = Callable[..., Path]


@pytest.fixture
def train(place: Path) -> Train:
    """Record a short run, offline; returns its directory."""

    def record(
        name: str = "d12",
        steps: int = 5,
        project: str = "demo",
        save: bytes | None = None,
        **options: object,
    ) -> Path:
        run = endlex.init(project, name, mode="offline", **options)  # type: ignore[arg-type]
        for step in range(steps):
            run.log({"train/loss": 3.0 / (step + 1), "val/bpb": 1.0 - step / 10}, step=step)
        if save is not None:
            model = place / f"{name}.bin"
            model.write_bytes(save)
            run.save(model, step=steps, name=f"step-{steps}", aliases=["best"])
        run.finish()
        assert run.directory is not None
        return run.directory

    return record
