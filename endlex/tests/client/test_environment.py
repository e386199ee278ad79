"""What a run was, what it printed and what ended it are recorded with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import endlex
from endlex.client.environment import (
    LAST_LINES,
    describe_environment,
    installed_packages,
    uncommitted_changes,
)
from endlex.reading import gone_reason, read_run, session_files


def run_script(directory: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    start = f"import endlex, os, sys\nrun = endlex.init('p', 'd4', directory={str(directory)!r})\n"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ENDLEX_")}
    return subprocess.run(
        [sys.executable, "-c", start + script],
        capture_output=True,
        text=True,
        check=False,
        env=kept | variables,
    )


def texts(directory: Path, name: str) -> list[str]:
    return [r["text"] for r in read_run(directory) if r["type"] == "text" and r["name"] == name]


def last(directory: Path) -> dict[str, Any]:
    return list(read_run(directory))[-1]


def test_an_exception_is_recorded_with_its_traceback_and_the_last_lines(tmp_path: Path) -> None:
    ended = run_script(tmp_path, "print('step 1')\nprint('a\\rb')\nraise ValueError('too\\nbad')")
    assert "ValueError: too" in ended.stderr
    end = last(tmp_path)
    assert (end["status"], end["reason"]) == ("failed", "ValueError: too bad")
    (exception,) = texts(tmp_path, "run/exception")
    assert exception.startswith("Traceback")
    console = "\n".join(texts(tmp_path, "run/console")).splitlines()
    assert console[:2] == ["step 1", "b"]
    assert console[-1] == "bad"


@pytest.mark.parametrize(
    ("script", "status", "reason"),
    [
        ("sys.exit(3)", "failed", "exit status 3"),
        ("sys.exit('no data')", "failed", "exit: no data"),
        ("raise KeyboardInterrupt", "interrupted", "interrupted by Ctrl-C"),
        ("with run: 1 / 0", "failed", "ZeroDivisionError: division by zero"),
        ("pass", "finished", None),
    ],
)
def test_each_end_says_why(tmp_path: Path, script: str, status: str, reason: str | None) -> None:
    run_script(tmp_path, script)
    assert (last(tmp_path)["status"], last(tmp_path).get("reason")) == (status, reason)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGTERM, "ended by a signal (SIGTERM or SIGHUP)"),
        (signal.SIGSEGV, "Fatal Python error: Segmentation fault"),
        (signal.SIGKILL, "killed (SIGKILL"),
    ],
)
def test_a_signal_leaves_its_stack_behind(
    tmp_path: Path, number: signal.Signals, said: str
) -> None:
    ended = run_script(tmp_path, f"def fit():\n    os.kill(os.getpid(), {int(number)})\nfit()")
    assert ended.returncode == -number
    (journal,) = session_files(tmp_path)
    assert gone_reason(journal).startswith(said)
    assert ("in fit" in gone_reason(journal)) == (number != signal.SIGKILL)


def test_a_run_knows_its_commit_changes_command_and_packages(tmp_path: Path) -> None:
    checkout, directory = tmp_path / "code", tmp_path / "run"
    checkout.mkdir()

    def git(*words: str) -> str:
        names = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(
            ["git", "-C", str(checkout), *names, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q", "-b", "main")
    script = checkout / "train.py"
    script.write_text(f"import endlex\nendlex.init('p', directory={str(directory)!r})\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    script.write_text(script.read_text() + "# changed\n")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ENDLEX_")}
    subprocess.run([sys.executable, str(script), "--lr", "1 2"], env=kept, check=True)
    (environment,) = texts(directory, "run/environment")
    found = json.loads(environment)
    assert (found["commit"], found["branch"]) == (git("rev-parse", "HEAD"), "main")
    assert found["command"] == "train.py --lr '1 2'"
    assert "+# changed" in texts(directory, "run/changes")[0]
    assert "pytest==" in texts(directory, "run/packages")[0]
    assert uncommitted_changes(checkout).startswith("diff --git")
    assert "commit" not in describe_environment(tmp_path)
    assert installed_packages()
    git("pack-refs", "--all")
    assert describe_environment(script)["commit"] == found["commit"]
    git("worktree", "add", "-q", "-b", "other", str(tmp_path / "second"))
    second = describe_environment(tmp_path / "second")
    assert (second["commit"], second["branch"]) == (found["commit"], "other")
    git("checkout", "-q", "--detach")
    assert describe_environment(script)["commit"] == found["commit"]


def test_the_console_is_bounded_and_keeps_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("endlex.client.environment.MAX_CONSOLE_CHARS", 1000)
    run = endlex.init("p", "d4", directory=tmp_path, console=True)
    for number in range(500):
        print(f"\x1b[31mline {number:04d}\x1b[0m")
    print("no line end", end="")
    run.finish()
    print("after")
    lines = "\n".join(texts(tmp_path, "run/console")).splitlines()
    assert lines[:2] == ["line 0000", "line 0001"]
    assert lines[-1] == "no line end"
    assert f"... {501 - LAST_LINES - 101:,} lines left out ..." in lines
    assert "after" in capsys.readouterr().out


def test_what_wandb_takes_is_taken_or_ignored_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"entity": "me", "reinit": True, "settings": None}
    run = endlex.init("p", "d4", dir=tmp_path, job_type="train", tags=["a"], **options)
    run.finish()
    assert run.directory is not None
    assert run.directory.parent == tmp_path / "p"
    assert next(read_run(run.directory))["tags"] == ["a", "train"]
    assert "ignores what means nothing here: entity, reinit" in capsys.readouterr().err
    with pytest.raises(TypeError, match="no argument 'projct'"):
        endlex.init("p", projct="x")
    with pytest.raises(endlex.EndlexError, match="tag 5 must be printable"):
        endlex.init("p", dir=tmp_path, job_type=5)  # type: ignore[arg-type]
    with pytest.raises(endlex.EndlexError, match="resume='never'"):
        endlex.init("p", directory=run.directory, resume="never")
    with pytest.raises(endlex.EndlexError, match="resume='must'"):
        endlex.init("p", directory=tmp_path / "none", resume="must")
    again = endlex.init("p", "d4", dir=tmp_path, resume="auto")
    assert again.directory == run.directory
    assert endlex.init("p", "other", dir=tmp_path, resume=True).directory != run.directory


def test_alerts_are_records_and_repeat_once_a_minute(tmp_path: Path) -> None:
    run = endlex.init("p", "d4", directory=tmp_path)
    run.alert("NaN", "at step 3", level="error")
    run.alert("NaN", "at step 4")
    run.alert("odd", level="loud")  # type: ignore[arg-type]
    (alert,) = [record for record in read_run(tmp_path) if record["type"] == "alert"]
    assert (alert["title"], alert["text"], alert["level"]) == ("NaN", "at step 3", "error")
    assert run.refused["alert"] == 1


def test_a_forked_child_prints_and_its_lines_are_not_the_runs(tmp_path: Path) -> None:
    script = (
        "print('parent')\nchild = os.fork()\nif not child:\n    print('child')\n"
        "    sys.stdout.flush()\n    os._exit(0)\nos.waitpid(child, 0)"
    )
    ended = run_script(tmp_path, script)
    assert "child" in ended.stdout
    assert texts(tmp_path, "run/console") == ["parent"]


def test_the_end_of_a_forked_child_is_not_the_runs(tmp_path: Path) -> None:
    script = (
        "import signal, time\nchild = os.fork()\nif not child:\n    time.sleep(60)\n"
        "time.sleep(1)\n"  # a child that has barely begun still has its parent's handlers
        "os.kill(child, signal.SIGTERM)\nassert os.waitpid(child, 0)[1] == signal.SIGTERM\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert run_script(tmp_path, script).returncode == -signal.SIGKILL
    (journal,) = session_files(tmp_path)
    assert gone_reason(journal).startswith("killed (SIGKILL")


def test_a_forked_child_that_exits_leaves_its_parent_the_file_for_its_stack(tmp_path: Path) -> None:
    script = (
        "import signal\nchild = os.fork()\nif not child:\n    sys.exit()\n"
        "os.waitpid(child, 0)\nos.kill(os.getpid(), signal.SIGTERM)"
    )
    ended = run_script(tmp_path, script, PYTHONWARNINGS="always")
    assert ended.returncode == -signal.SIGTERM
    assert "ResourceWarning" not in ended.stderr
    (journal,) = session_files(tmp_path)
    assert gone_reason(journal).startswith("ended by a signal (SIGTERM or SIGHUP)")


def test_a_forked_child_that_begins_a_run_leaves_its_own_stack(tmp_path: Path) -> None:
    script = (
        "import signal\nchild = os.fork()\nif not child:\n"
        f"    endlex.init('p', 'child', directory={str(tmp_path / 'child')!r})\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "assert os.waitpid(child, 0)[1] == signal.SIGTERM"
    )
    assert run_script(tmp_path / "parent", script).returncode == 0
    (journal,) = session_files(tmp_path / "child")
    assert gone_reason(journal).startswith("ended by a signal (SIGTERM or SIGHUP)")
