"""The sandbox's own process: start a program under limits and make sure that it ends.

`sandbox.run_sandboxed` runs this in a separate interpreter. It uses the standard library only, and
one thread, so that forking is safe. There are four processes, each the parent of the next:

    supervisor   keeps the deadline and reports; watches a pipe that closes when its parent ends
    keeper       enters its own namespaces
    init         process 1 in these namespaces: when it ends, the kernel kills all that is left
    program      runs without capabilities, under limits

Without namespaces, the supervisor adopts and kills what the program leaves behind, the program may
not fork (unless root can give it a user of its own), and a guard in the interpreter refuses what
would reach outside. The guard stops accidents, not attacks; the report says what was in force.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import runpy
import select
import shutil
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from archerchat.sandbox import limits

LINUX = sys.platform.startswith("linux")
START_SECONDS = 20.0
"""How long the program may take to start on a busy machine; its timeout begins after that."""
PRIVATE_USERS = range(1_000_000_000, 2_000_000_000)
"""User ids that no account has. Each program gets one, so that the limit on its processes counts
only its own, and no file belongs to it."""
Request = dict[str, Any]


def main() -> None:
    """Serve the request on standard input; report to the file descriptor in `sys.argv[1]`."""
    report = int(sys.argv[1])
    os.set_inheritable(report, False)
    request: Request = json.loads(sys.stdin.buffer.readline())  # the pipe stays open after it
    if LINUX:
        limits.prctl(limits.PR_SET_CHILD_SUBREAPER, 1)
    news_in, news_out = os.pipe()
    verdict_in, verdict_out = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        for descriptor in (report, news_in, verdict_in):
            os.close(descriptor)
        _never_return(lambda: _keep(request, news_out, verdict_out))
    os.close(news_out)
    os.close(verdict_out)
    result = _supervise(request["timeout_s"], news_in)
    _kill_all(keeper, result.get("process"))
    os.set_blocking(verdict_in, False)
    with contextlib.suppress(BlockingIOError):
        result["verdict"] = _check_verdict(os.read(verdict_in, 4096), request["nonce"])
    if result["end"] == "cancelled":  # the parent may be dead, so it cleans up nothing
        shutil.rmtree(request["directory"], ignore_errors=True)
    with contextlib.suppress(BrokenPipeError):
        os.write(report, json.dumps(result).encode())


def _supervise(timeout: float, news: int) -> dict[str, Any]:
    """Wait for the program's end, for its deadline, or for the end of our parent."""
    result: dict[str, Any] = {"end": "timeout"}
    deadline = time.monotonic() + START_SECONDS
    lines = b""
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([news, 0], [], [], left)
        if news in ready:
            piece = os.read(news, 4096)
            if not piece:
                return result | {"end": "lost"}
            lines += piece
            *whole, lines = lines.split(b"\n")
            for line in whole:
                result |= json.loads(line)
                if "started" in result:
                    deadline = result.pop("started") + timeout
                if "status" in result:
                    return result | {"end": "ended"}
        elif 0 in ready:
            return result | {"end": "cancelled"}
    return result


def _kill_all(keeper: int, process: int | None) -> None:
    """Kill the keeper, then every child that this process inherits, until none is left."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(keeper, signal.SIGKILL)
    if process is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process, signal.SIGKILL)
    while True:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not ended:
            for child in limits.children(os.getpid()) if LINUX else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.002)


def _check_verdict(content: bytes, nonce: str) -> dict[str, Any] | None:
    """Return the verdict about the program's end, or None if the interpreter did not write it."""
    try:
        verdict = json.loads(content)
        return verdict if verdict.pop("nonce") == nonce else None
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def _never_return(run: Callable[[], None]) -> NoReturn:
    """Run a forked process's part and exit, so that it never continues its parent's code."""
    try:
        run()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(125)


def _die_with_parent() -> None:
    if LINUX:
        limits.prctl(limits.PR_SET_PDEATHSIG, signal.SIGKILL)


def _keep(request: Request, news: int, verdict: int) -> None:
    """Run the keeper: enter namespaces, start process 1 and wait for it."""
    _die_with_parent()
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    root = os.geteuid() == 0
    apart = LINUX and request["namespaces"] and limits.enter_namespaces(root=root)
    init = os.fork()
    if init == 0:
        _never_return(lambda: _be_init(request, news, verdict, root=root, apart=apart))
    os.close(news)
    os.close(verdict)
    os.waitpid(init, 0)


def _be_init(request: Request, news: int, verdict: int, *, root: bool, apart: bool) -> None:
    """Run process 1: confine files, start the program, reap orphans, report the program's end."""
    _die_with_parent()
    user = random.SystemRandom().choice(PRIVATE_USERS) if root else os.getuid()
    confined = apart and limits.confine_writes(request["directory"], request["disk_bytes"], user)
    if root:
        _make_python_readable(request["directory"], confined=confined)
        if not confined:
            os.chown(request["directory"], user, user)
    facts = {"network": apart, "processes": apart, "files": confined}
    started = {"started": time.monotonic(), "isolation": facts}  # before the program can flood us
    os.write(news, json.dumps(started).encode() + b"\n")
    program = os.fork()
    if program == 0:
        os.close(news)
        _never_return(lambda: _be_program(request, verdict, user if root else None, facts))
    os.close(verdict)
    if not apart:
        os.write(news, json.dumps({"process": program}).encode() + b"\n")
    while True:
        ended, status = os.wait()
        if ended == program:
            os.write(news, json.dumps({"status": status}).encode() + b"\n")
            return


def _make_python_readable(directory: str, *, confined: bool) -> None:
    """Make the standard library readable for a user without any rights."""
    library = sysconfig.get_path("stdlib")
    if limits.readable_by_all(library):
        return
    if not confined:
        raise PermissionError(
            f"root cannot hand a program to another user: nobody else may read {library}"
        )
    bound = f"{directory}/.python"
    Path(bound).mkdir(0o755)
    limits.bind(library, bound)
    sys.path[:] = [bound + entry.removeprefix(library) for entry in sys.path if library in entry]
    for module in list(sys.modules.values()):  # a package that is imported may have more to import
        if (path := getattr(module, "__path__", [""])[0]).startswith(library):
            module.__path__ = [bound + path.removeprefix(library)]
    sys.path_importer_cache.clear()


def _be_program(request: Request, verdict: int, user: int | None, facts: dict[str, bool]) -> None:
    """Give up all rights, set the limits, and run the program."""
    os.setsid()
    os.chdir(request["directory"])
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if LINUX:
        limits.drop_rights()
        _die_with_parent()
    processes = 0  # the user's other processes would count too
    if user is not None:
        processes = request["max_processes"]
    elif facts["processes"]:
        processes = request["max_processes"] + 2  # with the keeper and process 1
    limits.set_limits(
        {
            "RLIMIT_CPU": int(request["timeout_s"]) + 2,
            "RLIMIT_AS": request["memory_bytes"],
            "RLIMIT_NPROC": processes,
            "RLIMIT_FSIZE": request["disk_bytes"],
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        }
    )
    os.environ.clear()
    os.environ.update(HOME=request["directory"], TMPDIR=request["directory"])
    if not facts["files"]:
        limits.install_guard(request["directory"])
    _run(request["program"], verdict, request["nonce"])


def _run(program: str, verdict: int, nonce: str) -> NoReturn:
    """Run the program as `__main__` and say how it ended."""
    path = Path("program.py")
    path.write_bytes(program.encode(errors="replace"))
    sys.argv = [str(path)]
    result: dict[str, Any] = {"outcome": "completed"}
    process = os.getpid()
    try:
        runpy.run_path(str(path), run_name="__main__")
        sys.stdout.flush()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        result = {"outcome": "exited", "exit_code": code & 0xFF}
    except MemoryError:
        result = {"outcome": "memory", "exit_code": 1}
    except BaseException as error:
        result = {"outcome": "failed", "exit_code": 1}
        with contextlib.suppress(BaseException):
            traceback.print_exception(error, limit=-20)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    if os.getpid() == process:  # not in a process that the program forked
        os.write(verdict, json.dumps(result | {"nonce": nonce}).encode())
    os._exit(result.get("exit_code", 0))
