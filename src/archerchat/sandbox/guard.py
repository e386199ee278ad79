"""A guard within the interpreter, for systems that cannot keep a program's hands off the rest.

It is an audit hook, which cannot be removed again: what a program does through Python's own
functions passes by it. Code that brings its own way to the system, native code above all, would
get past; so this stops accidents, such as a generated program that cleans up too much, and no
attacker. Where the kernel confines the program, it is not used.
"""

from __future__ import annotations

import os
import sys
from typing import Any

FORBIDDEN = (
    "ctypes.",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "os.posix_spawn",
    "os.putenv",
    "os.spawn",
    "os.startfile",
    "os.system",
    "pty.spawn",
    "signal.pthread_kill",
    "socket.",
    "subprocess.Popen",
    "syslog.",
    "webbrowser.open",
)
"""Events that no exercise needs; a prefix where it ends in a dot."""
CHANGES = {
    "os.chflags": 1,
    "os.chmod": 1,
    "os.chown": 1,
    "os.link": 2,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rename": 2,
    "os.removexattr": 1,
    "os.rmdir": 1,
    "os.setxattr": 1,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.utime": 1,
    "shutil.rmtree": 1,
    "sqlite3.connect": 1,
}
"""Events that change files, and how many of their first arguments are paths."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def install(directory: str) -> None:
    """Refuse from now on what reaches outside `directory`, by a PermissionError."""
    inside = os.path.realpath(directory)

    def check_path(event: str, path: Any) -> None:
        if isinstance(path, int):  # a file that is open already, and was checked then
            return
        real = os.path.realpath(os.fsdecode(path))
        if real != inside and not real.startswith(inside + os.sep) and real != os.devnull:
            raise PermissionError(f"the sandbox allows no {event} of {real}")

    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and any(sign in mode for sign in "wax+")) or (
                isinstance(flags, int) and flags & _WRITING
            )
            if writes and path is not None:
                check_path("open for writing", path)
        elif event in CHANGES:
            for path in arguments[: CHANGES[event]]:
                check_path(event, path)
        elif any(
            event.startswith(each) if each.endswith(".") else event == each for each in FORBIDDEN
        ):
            raise PermissionError(f"the sandbox allows no {event}")

    sys.addaudithook(guard)
