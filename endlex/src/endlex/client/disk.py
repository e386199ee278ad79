"""What not every file system offers: locks (Lustre, NFS) and writes to the disk on request (FUSE).

Where they are missing, work goes on without them, with one warning.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

from endlex.client.warning import warn_once

if sys.platform != "win32":
    import fcntl

TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
"""What `flock` answers if another process has the lock; anything else means that there is none."""
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
FULL = (errno.ENOSPC, errno.EDQUOT)


def try_lock(file: Any, *, shared: bool = False) -> bool | None:
    """Lock an open file until it is closed.

    Returns:
        False if another process has the lock; None if files cannot be locked here.
    """
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            return False
        warn_once(f"files cannot be locked here ({error.strerror}): going on without locks")
        return None
    return True


def fsync(descriptor: int) -> None:
    """Put an open file or directory on the disk, where the file system can.

    Raises:
        OSError: the disk failed.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(f"this file system cannot be told to write to its disk ({error.strerror})")
