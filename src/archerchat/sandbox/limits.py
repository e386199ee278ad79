"""Confine a program: limits on resources, Linux's namespaces and capabilities, and a guard.

Only the supervisor's process imports this. Python 3.11 has no functions for namespaces, mounts and
capabilities, so they are called through ctypes. Each function here reports by its result, or by an
OSError, whether the system allowed it; the caller decides what to do if not.

The guard is for systems that cannot confine a program. It is an audit hook in the interpreter: it
cannot be removed, and it sees every action of Python's own functions. Native code bypasses it, so
it stops accidents, such as a program that deletes too much, but not attacks. It is not used if the
kernel confines the program.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import stat
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_SETATTR = 442
"""The system call's number, the same on every architecture that Python is built for."""
CAPABILITY_VERSION_3 = 0x20080522
FORBIDDEN = re.compile(
    r"os\.(exec|fork|forkpty|kill|killpg|posix_spawn|putenv|spawn|system)|pty\.spawn"
    r"|signal\.pthread_kill|subprocess\.Popen|webbrowser\.open|(ctypes|socket|syslog)\..*"
)
"""Audit events that no generated solution needs."""
CHANGES = re.compile(
    r"os\.(chflags|chmod|chown|mkdir|remove|removexattr|rmdir|setxattr|truncate|utime)"
    r"|shutil\.rmtree|sqlite3\.connect"
)
"""Audit events that change the file in their first argument."""
MOVES = re.compile(r"os\.(link|rename|symlink)")
"""Audit events that change the files in their first two arguments."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def _call(name: str, *arguments: object) -> None:
    """Call a function of the C library that returns -1 on failure."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process."""
    _call("prctl", option, *map(ctypes.c_ulong, (value, 0, 0, 0)))


def enter_namespaces(*, root: bool) -> bool:
    """Give this process's children their own processes, network, mounts and IPC.

    Root makes the namespaces directly; another user makes them within a user namespace, in which
    it keeps its own id.

    Returns:
        False if the system does not allow it; in that case nothing has changed.
    """
    user, group = os.getuid(), os.getgid()
    try:
        _call("unshare", NAMESPACES if root else NAMESPACES | CLONE_NEWUSER)
    except (OSError, AttributeError):
        return False
    if not root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return True


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    words = [word.encode() for word in (source, target, kind)]
    _call("mount", *words, ctypes.c_ulong(flags), options.encode())


def confine_writes(directory: str, size: int, owner: int) -> bool:
    """Make every file read-only except in a new, empty file system of `size` bytes at `directory`.

    This also hides the processes outside, and the sockets of services under /run.

    Returns:
        False if the system does not allow it, in which case files may be writable.
    """
    try:
        _mount("none", "/", "", MS_REC | MS_PRIVATE)
        attributes = _MountAttributes(attr_set=MS_RDONLY | MS_NOSUID)
        _call(
            "syscall",
            ctypes.c_long(MOUNT_SETATTR),
            AT_FDCWD,
            b"/",
            AT_RECURSIVE,
            ctypes.byref(attributes),
            ctypes.c_size_t(ctypes.sizeof(attributes)),
        )
        options = f"size={size},nr_inodes=1024,mode=0700,uid={owner},gid={owner}"
        if os.getuid():  # a user namespace has no id but this one
            options = f"size={size},nr_inodes=1024,mode=0700"
        _mount("tmpfs", directory, "tmpfs", MS_NOSUID | MS_NODEV, options)
        _hide("/proc", "proc")
    except (OSError, AttributeError):
        return False
    if not sysconfig.get_path("stdlib").startswith("/run/"):
        with contextlib.suppress(OSError):
            _hide("/run", "tmpfs")
    return True


def _hide(target: str, kind: str) -> None:
    """Mount this namespace's own `kind` on `target`; if that fails, an empty directory."""
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    try:
        _mount(kind, target, kind, flags | (MS_RDONLY if kind == "tmpfs" else 0))
    except OSError:
        _mount("tmpfs", target, "tmpfs", flags | MS_RDONLY)


def bind(source: str, target: str) -> None:
    """Make the directory `source` appear at `target` too."""
    _mount(source, target, "", MS_BIND | MS_REC)


def drop_rights() -> None:
    """Permanently give up every capability."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)())


def readable_by_all(directory: str) -> bool:
    """Return whether every user may read `directory`."""
    path = Path(directory).resolve()
    if not path.stat().st_mode & stat.S_IROTH:
        return False
    return all(each.stat().st_mode & stat.S_IXOTH for each in (path, *path.parents))


def children(process: int) -> list[int]:
    """Return the ids of a process's children."""
    try:
        listed = Path(f"/proc/{process}/task/{process}/children").read_text()
        return [int(word) for word in listed.split()]
    except OSError:  # not every kernel has this list
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if _parent(path) == process]


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def set_limits(limits: Mapping[str, int]) -> None:
    """Permanently set resource limits, by names such as RLIMIT_CPU."""
    for name, value in limits.items():
        # Not every system has or enforces all of them.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))


def install_guard(directory: str) -> None:
    """From now on, refuse what reaches outside `directory` with a PermissionError."""
    inside = os.path.realpath(directory)

    def check_path(event: str, path: Any) -> None:
        if isinstance(path, int):  # a file that is already open was checked when it was opened
            return
        real = os.path.realpath(os.fsdecode(path))
        if real != inside and not real.startswith(inside + os.sep) and real != os.devnull:
            raise PermissionError(f"the sandbox allows no {event} of {real}")

    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and any(sign in mode for sign in "wax+")) or (
                isinstance(flags, int) and flags & WRITING
            )
            if writes and path is not None:
                check_path("open for writing", path)
        elif CHANGES.fullmatch(event) or MOVES.fullmatch(event):
            for path in arguments[: 2 if MOVES.fullmatch(event) else 1]:
                check_path(event, path)
        elif FORBIDDEN.fullmatch(event):
            raise PermissionError(f"the sandbox allows no {event}")

    sys.addaudithook(guard)
