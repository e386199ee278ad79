"""The real processes of the fault tests: a server, a trainer, and the shipper that it starts."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from endlex.client.directories import read_run_file
from endlex.client.shipper.control import shipper_process
from endlex.reading import session_files, writer_is_alive

TRAINER = Path(__file__).with_name("faulty_trainer.py")
START_SECONDS = 60.0
RECOVERY_SECONDS = 180.0
"""The longest wait of a shipper between two tries is 30 s."""


_started: list[ServerProcess | TrainerProcess] = []


def stop_all() -> None:
    """Kill whatever a scenario that failed has left running."""
    for process in _started:
        process.kill()
        if isinstance(process, TrainerProcess):
            process.kill_shipper()
    _started.clear()


def wait_until(what: str, true: Callable[[], bool], seconds: float = START_SECONDS) -> None:
    """Poll until something holds.

    Raises:
        AssertionError: it did not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.02)


def free_port() -> int:
    """A port that is free now; a server that is killed and started again keeps it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """`endlex serve` on a port of its own, killed and started at will.

    As a context manager it is started first and ended last.

    Args:
        log: where it says what it does; beside its data if not given.
    """

    def __init__(self, data: Path, *options: str, log: Path | None = None) -> None:
        self.data, self.port, self._options = data, free_port(), options
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.log = log or data.with_name(data.name + ".log")
        _started.append(self)

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, *, wait: bool = True) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "endlex", "serve", "--port", str(self.port)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--data", str(self.data), *self._options], stdout=log, stderr=log
            )
        if wait:
            wait_until("the server answers", self.answers)

    def answers(self) -> bool:
        """Whether it is healthy; an assertion fails where it has ended by itself."""
        assert self._process is None or self._process.poll() is None, self.log.read_text()
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """kill -9, whatever it does at the moment."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    stop = kill


class TrainerProcess:
    """A trainer on one run's directory, and the shipper that belongs to it.

    Args:
        notes: where its log and its progress go; beside the directory if not given.
    """

    def __init__(
        self, directory: Path, url: str | None, *options: str, notes: Path | None = None
    ) -> None:
        self.directory, self._options = directory, options
        notes = notes or directory.parent
        self.progress = notes / f"{directory.name}.progress"
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("ENDLEX_")}
        self._environment["HOME"] = str(notes)  # no token of the user's
        if url:
            self._environment["ENDLEX_URL"] = url
        self._process: subprocess.Popen[bytes] | None = None
        self.log = notes / f"{directory.name}.log"
        _started.append(self)

    def start(self) -> None:
        """Start it; it goes on where the journal ends."""
        command = [sys.executable, str(TRAINER), str(self.directory)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--progress", str(self.progress), *self._options],
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    @property
    def run_id(self) -> str:
        """Of the run that it has begun."""
        owner = read_run_file(self.directory)
        assert owner is not None
        return owner["run"]

    @property
    def steps_logged(self) -> int:
        """The last step that `log` returned from, -1 before the first."""
        try:
            return int(self.progress.read_bytes() or b"-1")
        except FileNotFoundError:
            return -1

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is logged; an assertion fails where the trainer failed."""

        def reached() -> bool:
            failed = self._process is not None and self._process.poll() not in (None, 0)
            assert not failed, self.log.read_text()
            return self.steps_logged >= step

        wait_until(f"step {step}", reached)

    def kill(self) -> None:
        """kill -9, whatever it does at the moment."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def finish(self) -> None:
        """End it in an orderly way."""
        if self._process is None:
            return
        (self.directory / "stop").touch()
        assert self._process.wait(START_SECONDS) == 0, self.log.read_text()
        (self.directory / "stop").unlink()
        self._process = None

    def wait_for_end(self) -> None:
        """Wait until a trainer with `--steps` has ended, its shipper started."""
        assert self._process is not None
        assert self._process.wait(START_SECONDS) == 0, self.log.read_text()
        self._process = None

    def kill_shipper(self) -> bool:
        """kill -9 of the directory's shipper; whether there was one."""
        found = shipper_process(self.directory)
        if found is None or not found[0]:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(found[0], signal.SIGKILL)
        return True

    def start_shipper(self) -> None:
        """Start the shipper, as the next session would."""
        command = [sys.executable, "-m", "endlex.client.shipper", str(self.directory)]
        with self.log.open("ab") as log:
            subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    def wait_for_shipper_s_end(self, seconds: float = START_SECONDS) -> None:
        """Wait until everything is acknowledged, so that the shipper has ended by itself."""
        wait_until("the shipper's end", lambda: shipper_process(self.directory) is None, seconds)

    @property
    def is_alive(self) -> bool:
        """Whether any session's writer is."""
        return any(writer_is_alive(path) for path in session_files(self.directory))


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Callable[[int], None]]:
    """Mount a disk in memory; the function that is yielded gives it another size.

    Raises:
        PermissionError: mounting is not allowed here.
    """
    folder.mkdir()

    def mount(*words: str) -> bool:
        done = subprocess.run(["mount", *words, str(folder)], capture_output=True, check=False)
        return done.returncode == 0

    if os.geteuid() or not mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs"):
        raise PermissionError("a disk in memory needs the right to mount one")
    try:
        yield lambda size: (mount("-o", f"remount,size={size}m"), None)[1]
    finally:
        wait_until(
            "nobody uses the disk in memory",
            lambda: subprocess.run(["umount", folder], capture_output=True).returncode == 0,
        )
