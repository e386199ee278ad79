"""Which process holds a file: a bare id means another process in another container or boot."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


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
    host = os.uname().nodename if hasattr(os, "uname") else "-"
    return f"{pid} {start} {host} {boot} {namespace}"


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
