"""Run an untrusted program that a model wrote, in a separate, confined interpreter.

    result = run_sandboxed("print(6 * 7)", timeout_s=5)
    result.outcome, result.stdout                        # 'completed', '42\\n'

The program gets a fresh interpreter with the standard library, an empty directory of limited size
as its working directory and home, no environment, and limits on processor time, memory, processes,
files and output. On Linux, if the system allows namespaces, it has no network, sees no other
process, and cannot write outside its directory; a result's `isolation` says which of these held.
At the deadline, and when the program ends, every process that it started is killed.

Without namespaces (some containers, macOS) only the limits and a guard in the interpreter remain.
They stop accidents, not attacks: run untrusted models on Linux. A program can read the user's
files, but without a network it can reveal them only in its output.

`completed` means that the interpreter reached the program's end. A program that searches the
interpreter's memory for the supervisor's nonce could claim it too soon.

Safe to call from many threads: nothing runs between fork and exec in this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from archerchat.errors import ArcherChatError

Ending = Literal["completed", "exited", "failed", "timeout", "memory", "output", "killed"]

GRACE_SECONDS = 25.0
"""Seconds that the supervisor may take after the deadline; normally it needs milliseconds."""
LAUNCH = (
    "import sys; sys.path.insert(0, sys.argv[2]); "
    "from archerchat.sandbox import supervisor; "
    "del sys.path[0]; supervisor.main()"
)
PACKAGE_ROOT = str(Path(__file__).parents[2])

_Said = tuple[dict[str, Any], bytes, bytes, bool]
"""The supervisor's report (or {}), stdout, stderr, and whether the output was too long."""


class SandboxError(ArcherChatError):
    """Report a sandbox that cannot be set up on this machine."""


@dataclass(frozen=True)
class Isolation:
    """The isolation that the system gave a program, besides its limits."""

    network: bool = False
    """Whether the program had no network."""
    processes: bool = False
    """Whether the program could neither see nor signal processes outside."""
    files: bool = False
    """Whether the program could write only in its directory."""


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended, and what it printed."""

    outcome: Ending
    """`completed`: it ran to its end. `exited`: it called exit. `failed`: it raised an exception.
    `timeout`, `memory`, `output`: it reached that limit. `killed`: a signal ended it."""
    stdout: str
    stderr: str
    """Like `stdout`, truncated at the limit of output."""
    isolation: Isolation


def run_sandboxed(
    program: str,
    timeout_s: float = 5.0,
    *,
    memory_bytes: int = 256 << 20,
    max_output_bytes: int = 64 << 10,
    disk_bytes: int = 16 << 20,
    max_processes: int = 16,
    namespaces: bool = True,
) -> SandboxResult:
    """Run Python source `program`, delete its files and processes, and return how it ended.

    Args:
        timeout_s: seconds of wall-clock time from the program's start. The limit on processor
            time is two seconds more.
        memory_bytes: address space of each of its processes; the interpreter needs about 50 MiB.
        max_output_bytes: bytes of stdout, and of stderr; a program that writes more is stopped.
        disk_bytes: bytes in its directory, if the system can limit that, and in each file.
        max_processes: maximum number of processes, including threads.
        namespaces: False disables the kernel's isolation, as on a system that lacks it.

    Raises:
        SandboxError: the sandbox cannot be set up; the message says why.
    """
    deadline = time.monotonic() + timeout_s + GRACE_SECONDS
    with tempfile.TemporaryDirectory(
        prefix="archerchat-sandbox-", ignore_cleanup_errors=True
    ) as directory:
        request = {
            "program": program,
            "directory": os.path.realpath(directory),
            "timeout_s": timeout_s,
            "memory_bytes": memory_bytes,
            "disk_bytes": disk_bytes,
            "max_processes": max_processes,
            "namespaces": namespaces,
            "nonce": secrets.token_hex(16),
        }
        ended = _exchange(request, max_output_bytes, deadline)
    return _judge(ended)


def _exchange(request: dict[str, Any], max_output: int, deadline: float) -> _Said:
    """Start a supervisor, send it the request, and collect the output and its report."""
    report_in, report_out = os.pipe()
    with os.fdopen(report_in, "rb", 0) as report:
        try:
            supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LAUNCH, str(report_out), PACKAGE_ROOT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(report_out,),
                env={},
                cwd=request["directory"],
                start_new_session=True,
            )
        finally:
            os.close(report_out)
        try:
            assert supervisor.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                supervisor.stdin.write(json.dumps(request).encode() + b"\n")
                supervisor.stdin.flush()
            return _collect(supervisor, report.fileno(), max_output, deadline)
        finally:
            _end(supervisor)


def _collect(
    supervisor: subprocess.Popen[bytes], report: int, max_output: int, deadline: float
) -> _Said:
    """Read output and report to their ends; stop a program that writes too much."""
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    assert supervisor.stderr is not None
    sources = supervisor.stdout.fileno(), supervisor.stderr.fileno(), report
    received = {source: bytearray() for source in sources}
    flooded = False
    with selectors.DefaultSelector() as selector:
        for source in sources:
            selector.register(source, selectors.EVENT_READ)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                content = received[key.fd]
                piece = os.read(key.fd, 1 << 16)
                if not piece:
                    selector.unregister(key.fd)
                content += piece
                if key.fd != report and len(content) > max_output:
                    del content[max_output:]
                    flooded = True
                    with contextlib.suppress(BrokenPipeError):
                        supervisor.stdin.close()  # which ends the program
    stdout, stderr, told = (bytes(content) for content in received.values())
    return json.loads(told) if told else {}, stdout, stderr, flooded


def _end(supervisor: subprocess.Popen[bytes]) -> None:
    """Wait for the supervisor to finish; kill it if it does not."""
    for stream in (supervisor.stdin, supervisor.stdout, supervisor.stderr):
        if stream:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    try:
        supervisor.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(supervisor.pid, signal.SIGKILL)
        supervisor.wait()


def _judge(ended: _Said) -> SandboxResult:
    """Turn the supervisor's report into a result."""
    report, stdout, stderr, flooded = ended
    said = stdout.decode(errors="replace"), stderr.decode(errors="replace")
    if "isolation" not in report:
        lines = said[1].strip().splitlines() or ["it ended without a message"]
        raise SandboxError(f"the sandbox could not start a program: {lines[-1]}")
    verdict = report.get("verdict") or {}
    status = report.get("status")
    code = os.waitstatus_to_exitcode(status) if status is not None else None
    outcome: Ending = "exited"
    if flooded:
        outcome = "output"
    elif report["end"] == "timeout" or code == -signal.SIGXCPU:
        outcome = "timeout"
    elif code is None or code < 0:
        outcome = "killed"
    elif verdict:
        outcome = verdict["outcome"]
    return SandboxResult(outcome, *said, isolation=Isolation(**report["isolation"]))
