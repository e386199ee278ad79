"""A real `endlex serve` for the benchmarks of Endlex, on a free port of this machine."""

from __future__ import annotations

import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 60.0
STOP_SECONDS = 30.0


@contextmanager
def running_server(data: Path) -> Iterator[str]:
    """Serve a data directory until the block ends; yields the URL.

    Raises:
        RuntimeError: the server does not start; its own words are on stderr.
    """
    command = [sys.executable, "-m", "endlex", "serve", "--port", "0", "--data", str(data)]
    with subprocess.Popen(
        [*command, "--min-free-gb", "0.001"], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield _url(process)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _url(process: subprocess.Popen[str]) -> str:
    """Return the address, which a server prints when it listens, once it answers there too."""
    assert process.stdout is not None
    too_late = threading.Timer(START_SECONDS, process.kill)
    too_late.start()
    try:
        url = process.stdout.readline().split()[-1]
        with urllib.request.urlopen(f"{url}/health", timeout=START_SECONDS):
            return url
    except (IndexError, OSError) as error:
        raise RuntimeError("`endlex serve` does not start: run it by hand to see why") from error
    finally:
        too_late.cancel()
