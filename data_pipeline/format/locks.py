"""One process at a time, for the moment of a commit."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

LOCK = ".lock"  # stays in the folder, empty: a lock file that is deleted locks nothing
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`. The kernel frees it when its holder dies, on whatever machine.

    Where a file system knows no locks (Lustre without `-o flock`), work goes on without, and says so.
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
                "%s knows no file locks (%s): do not run two tasks on the same share",
                folder,
                error.strerror,
            )
        yield
    finally:
        os.close(fd)
