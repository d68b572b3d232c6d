"""Explains failed writes: the path, and whether the disk is full or read-only. Torch-free."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
REFUSED = frozenset({errno.EACCES, errno.EPERM})
# Texts of libraries that wrap the OSError.
FULL_WORDS = ("No space left on device", "Disk quota exceeded")
REFUSED_WORDS = ("Permission denied", "Operation not permitted")
READ_ONLY_WORDS = ("Read-only file system",)
TORCH_WRITER = "inline_container"
"""Part of the message of torch's zip writer when a write fails."""

NEARLY_FULL = 16 << 20
"""Free bytes below which an unexplained failure of a library counts as a full disk."""

FREE_SPACE = "free some space or raise the quota"
PERMISSIONS = "check owner, permissions and attributes (lsattr) of the file and of its folder"
READ_ONLY = "choose a folder on a file system that is not mounted read-only"


@contextmanager
def naming(path: Path, *temporaries: Path) -> Iterator[None]:
    """Context manager that adds `path` to disk errors that name no file, or one of `temporaries`.

    The error of a failed write does not name the file, and torch's zip writer raises a RuntimeError
    instead. Raises OSError with the error number of the cause.
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
    """A copy of `error` that names `path`."""
    return OSError(error.errno, error.strerror or os.strerror(error.errno or 0), str(path))


def way_out(error: BaseException, folder: Path) -> str:
    """Advice for a failed write below `folder`; empty if the disk is not the cause.

    Decided by the error numbers of `error` and of the errors that caused it. For a library error
    that does not give a reason, the state of the folder decides.
    """
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    for cause in chain:
        number = cause.errno if isinstance(cause, OSError) else None
        text = str(cause)
        if number in FULL or any(words in text for words in FULL_WORDS):
            return FREE_SPACE
        if number == errno.EROFS or any(words in text for words in READ_ONLY_WORDS):
            return READ_ONLY
        if number in REFUSED or any(words in text for words in REFUSED_WORDS):
            return PERMISSIONS
    return "" if isinstance(error, OSError) else way_out_of(folder)


def way_out_of(folder: Path) -> str:
    """Advice from the state of `folder` (read-only, not permitted, nearly full), or ""."""
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
    folder = Path(name).parent if name else Path.cwd()
    text = error.strerror or str(error) or type(error).__name__
    advice = way_out(error, folder)
    if advice:
        text = f"{text}; {advice}"
    return f"{name}: {text}" if name else text
