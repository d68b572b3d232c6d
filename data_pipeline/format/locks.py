"""Kernel lock of a folder for short critical sections, such as a commit.

`landiff.configs.ownership` is a different kind of lock. It lasts for hours, names its owner, fails
instead of waiting, and does not need flock. Here, processes wait for each other, nobody needs to
know who holds the lock, and the kernel releases it with the holder's file descriptor.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

LOCK = ".lock"  # never deleted: two processes could then lock two different files
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context manager that holds the lock of `folder`; waits while another process holds it.

    The kernel releases the lock when its holder ends. On a file system without locks (Lustre
    without `-o flock`), a warning is logged and nothing is locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            log.warning(
                "%s does not support file locks (%s): do not run two tasks on it at once",
                folder,
                error.strerror,
            )
        yield
    finally:
        with suppress(OSError):  # a child that was forked meanwhile has the descriptor too
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)
