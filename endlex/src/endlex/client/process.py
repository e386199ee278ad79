"""What a process needs of its system: warnings, locks, names of processes, and its own end.

Locks (Lustre, NFS) and `fsync` (FUSE) are not everywhere: where they are missing, Endlex works
without them, with one warning.

A run that the program did not finish is recorded as it exits, with what ended it: the interpreter
keeps the exception that nobody caught in `sys.last_value`, `sys.exit` is wrapped to note its code,
and `atexit` finishes the runs that are left. A `SystemExit` that is raised without `sys.exit`
leaves no trace: a run that it ends counts as finished. Of a process that is killed, the shipper
sees that the writer is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import faulthandler
import fcntl
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from functools import cache, partial, wraps
from pathlib import Path
from typing import IO, Any, NoReturn

from endlex.protocol import EndlexError, Status


def warn(message: str) -> None:
    """Print a line, also in a signal handler, and where stderr is closed."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # RuntimeError: it was printing
        print(f"endlex: {message}", file=sys.stderr)


@cache
def warn_once(message: str) -> None:
    """Print a line, once per process."""
    warn(message)


def replace_unencodable() -> None:
    """Let stdout and stderr show another character for one that they cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # another process has the lock
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
FULL = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)  # as a snapshot, which is sent all the same


def try_lock(file: Any, *, shared: bool = False) -> bool | None:
    """Lock an open file until it is closed; return False if another process has the lock.

    None means that files cannot be locked here.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            return False
        warn_once(f"files cannot be locked here ({error.strerror}): continuing without locks")
        return None
    return True


def fsync(descriptor: int) -> None:
    """Put an open file or directory on the disk, where the file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(f"this file system cannot flush to its disk ({error.strerror})")


def write_whole(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace a file's content, so that readers never see a part of it."""
    with replacing(path, durable=durable) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Yield a file of a hidden name, which replaces `path` after the block unless that fails."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def process_name(pid: int | None = None) -> str:
    """Name a process of this PID namespace, by default this one, unlike any other ever.

    The name has the process id, its start, the host, the boot and the namespace, with spaces.
    Systems without `/proc` have no namespaces, and the start and the boot are left out there.
    """
    pid, start, boot, namespace = pid or os.getpid(), "-", "-", "-"
    with contextlib.suppress(OSError, IndexError):
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return f"{pid} {start} {os.uname().nodename} {boot} {namespace}"


def is_running(name: object) -> bool:
    """Whether a process of this name runs here, so that its id may be signalled."""
    pid = name.partition(" ")[0] if isinstance(name, str) else ""
    if not pid.isdecimal() or not int(pid) or name != process_name(int(pid)):
        return False
    try:
        os.kill(int(pid), 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def describe(name: str) -> str:
    """Return a process's name for people."""
    pid, _, host, *_ = [*name.split(), "", "", ""]
    here = "" if is_running(name) else " (not a process of this machine, or of this container)"
    return f"process {pid or 'unknown'}{host and ' on '}{host}{here}"


UNFINISHED: dict[Any, tuple[int, SystemExit] | None] = {}
"""The runs of this process that are not finished. Once `sys.exit` was called: with what each had
recorded by then, and its error."""


def status_of(error: BaseException | None) -> Status:
    """How a run ended that this exception left: `sys.exit()` is an end like any other."""
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return "finished"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def describe_error(error: BaseException) -> str:
    """Return what ended a program, on one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by Ctrl-C"
    if isinstance(error, SystemExit):
        word = "exit status " if isinstance(error.code, int) else "exit: "
        return f"{word}{error.code}"
    return " ".join("".join(traceback.format_exception_only(error)).split())


@cache
def watch_exit() -> None:
    """Have the runs that are still `UNFINISHED` finished when the interpreter exits."""
    atexit.register(_finish_all)
    plain_exit = sys.exit

    @wraps(plain_exit)
    def note_exit(status: Any = None, /) -> NoReturn:
        if threading.current_thread() is threading.main_thread():  # else it ends a thread alone
            for run in list(UNFINISHED):  # another thread may finish one meanwhile
                UNFINISHED[run] = run.recorded, SystemExit(status)
        plain_exit(status)

    sys.exit = note_exit


def _finish_all() -> None:
    uncaught: BaseException | None = getattr(sys, "last_value", None)
    for run, left in list(UNFINISHED.items()):
        recorded, exited = left or (0, None)
        # If the program recorded more since it called `sys.exit`, something caught that.
        ended = exited if recorded == run.recorded else None
        error = ended if uncaught is None else uncaught
        try:
            run.finish(status_of(error), error=error)
        except (EndlexError, OSError) as problem:
            warn(f"the end of the run could not be recorded: {problem}")


def watch_faults(path: Path) -> None:
    """Have the interpreter write its stack to a file when a signal ends this process.

    It does so in C, at once, whatever the program is in: a segmentation fault, an abort, SIGTERM or
    SIGHUP. A program that has asked for the same itself keeps what it has.
    """
    with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
        if faulthandler.is_enabled():
            return
        file = path.open("w")
        faulthandler.enable(file, all_threads=False)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                faulthandler.register(number, file, all_threads=False, chain=True)
        os.register_at_fork(after_in_child=partial(_leave_faults, file))


def _leave_faults(file: IO[str]) -> None:
    """Keep the end of a forked child, such as a data loader's, out of the parent's file."""
    faulthandler.disable()
    for number in (signal.SIGTERM, signal.SIGHUP):
        faulthandler.unregister(number)
    file.close()


def oom_kills() -> int:
    """How many processes the kernel of this machine has ended for lack of memory."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/vmstat").read_text().partition("\noom_kill ")[2].split()[0])
    return 0
