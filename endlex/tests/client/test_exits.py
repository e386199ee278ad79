"""However a program ends that does not finish its run, the journal says how it ended."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from endlex.reading import end_status, session_files, writer_is_alive

START = """
import endlex, sys
run = endlex.init("p", "d4", directory=sys.argv[1])
run.log({"loss": 1.0})
print("logged", flush=True)
"""
CAUGHT = """
try:
    sys.exit(3)
except SystemExit:
    pass
"""
IN_A_THREAD = """
import threading
thread = threading.Thread(target=sys.exit, args=(3,))
thread.start()
thread.join()
"""
ANOTHER_THREAD_FINISHES_A_RUN = """
import threading
other = endlex.init("p", "other", directory=sys.argv[1] + "/other")
class Slow(endlex.Run):
    @property
    def recorded(self):
        thread = threading.Thread(target=other.finish)
        thread.start()
        thread.join()
        return super().recorded
run.__class__ = Slow
sys.exit(3)
"""


@pytest.mark.parametrize(
    ("ending", "status", "code"),
    [
        ("", "finished", 0),
        ("run.finish('failed')", "failed", 0),
        ("raise ValueError('diverged')", "failed", 1),
        ("raise KeyboardInterrupt", "interrupted", -signal.SIGINT),
        ("import os; os._exit(3)", None, 3),
        ("sys.exit()", "finished", 0),
        ("sys.exit(0)", "finished", 0),
        ("sys.exit(3)", "failed", 3),
        ("sys.exit('diverged')", "failed", 1),
        (CAUGHT + "run.log({'loss': 2.0})", "finished", 0),
        (CAUGHT + "raise KeyboardInterrupt", "interrupted", -signal.SIGINT),
        (IN_A_THREAD, "finished", 0),
        (ANOTHER_THREAD_FINISHES_A_RUN, "failed", 3),
        ("with run: sys.exit(4)", "failed", 4),
    ],
)
def test_the_end_is_recorded(tmp_path: Path, ending: str, status: str | None, code: int) -> None:
    command = [sys.executable, "-c", START + ending, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code
    (path,) = session_files(tmp_path)
    assert end_status(path) == status
    assert not writer_is_alive(path)
    if code == 1:
        assert "diverged" in done.stderr


def test_sigterm_is_no_end_that_the_trainer_tells_of(tmp_path: Path) -> None:
    script = START + "import time; time.sleep(60)"
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        trainer.stdout.readline()
        (path,) = session_files(tmp_path)
        assert writer_is_alive(path)
        trainer.terminate()
    assert end_status(path) is None
    assert not writer_is_alive(path)


def test_a_hook_that_was_there_before_is_still_called(tmp_path: Path) -> None:
    script = "import sys; sys.excepthook = lambda *a: print('mine', a[0].__name__)\n" + START
    script += "raise ValueError"
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "mine ValueError" in done.stdout
    assert end_status(session_files(tmp_path)[0]) == "failed"
