"""What a failed write means: names the path and tells a full disk from a refused one. Torch-free."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
REFUSED = frozenset({errno.EACCES, errno.EPERM})
FULL_WORDS = ("No space left on device", "Disk quota exceeded")  # of libraries that wrap the error
REFUSED_WORDS = ("Permission denied", "Operation not permitted")
READ_ONLY_WORDS = ("Read-only file system",)
TORCH_WRITER = "inline_container"  # in the message of its failed writes
NEARLY_FULL = (
    16 << 20
)  # free bytes below which a library's unexplained failure is put down to space

FREE_SPACE = "free some space or raise the quota"
PERMISSIONS = "check owner, permissions and attributes (lsattr) of the file and of its folder"
READ_ONLY = "choose a folder on a file system that is not mounted read-only"


@contextmanager
def naming(path: Path, *temporaries: Path) -> Iterator[None]:
    """Disk errors of the body that name no file, or one of `temporaries`, name `path`.

    A write that fails says only that the disk is full, not which file it was; torch's zip writer reports
    it as a RuntimeError. Raises OSError with the error number of the cause.
    """
    try:
        yield
    except OSError as error:
        hidden = {str(temporary) for temporary in temporaries}
        named = error.filename is not None and str(error.filename) not in hidden
        if named or error.errno is None:
            raise
        raise _at(path, error) from error
    except RuntimeError as error:
        cause = error.__cause__ or error.__context__
        if TORCH_WRITER not in str(error) or not isinstance(cause, OSError) or cause.errno is None:
            raise
        raise _at(path, cause) from error


def _at(path: Path, error: OSError) -> OSError:
    return OSError(error.errno, error.strerror or os.strerror(error.errno or 0), str(path))


def way_out(error: BaseException, folder: Path) -> str:
    """What to do about a failed write below `folder`; empty where the cause is not the disk.

    Reads the error number, also of the errors that caused `error`. A library that reports a failed
    write without saying why is judged by the state of the folder.
    """
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    for one in chain:
        number = one.errno if isinstance(one, OSError) else None
        text = str(one)
        if number in FULL or any(words in text for words in FULL_WORDS):
            return FREE_SPACE
        if number == errno.EROFS or any(words in text for words in READ_ONLY_WORDS):
            return READ_ONLY
        if number in REFUSED or any(words in text for words in REFUSED_WORDS):
            return PERMISSIONS
    return "" if isinstance(error, OSError) else way_out_of(folder)


def way_out_of(folder: Path) -> str:
    """What keeps files from being written below `folder`; empty where nothing is found."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return READ_ONLY
    if not os.access(folder, os.W_OK | os.X_OK):
        return PERMISSIONS
    if shutil.disk_usage(folder).free < NEARLY_FULL:
        return FREE_SPACE
    return ""


def explain(error: OSError) -> str:
    """One line for the user: path, cause and way out."""
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    cause = error.strerror or str(error) or type(error).__name__
    folder = Path(name).parent if name else Path.cwd()
    return ": ".join(filter(None, [name, "; ".join(filter(None, [cause, way_out(error, folder)]))]))
